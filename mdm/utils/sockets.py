"""A folder for Unix sockets, whose paths the kernel limits to 107 bytes."""

import atexit
import os
import re
import shutil
import tempfile
from contextlib import suppress

_LONGEST = 32  # bytes of a folder, so that the paths that Ray makes in it stay within the limit
_SHORT = ("/tmp", "/dev/shm", "/var/tmp")


def socket_folder() -> str | None:
    """A short folder for this process, removed at its end; None if TMPDIR can be used.

    TMPDIR cannot be used if its path is too long, or has characters other than ASCII letters,
    digits and `/._-`. Raises ValueError if no short folder can be written either.
    """
    tmpdir = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(tmpdir) <= _LONGEST and re.fullmatch(r"[\w/.-]+", tmpdir, re.ASCII):
        return None
    for parent in _SHORT:
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="mdm-", dir=parent)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder
    raise ValueError(
        f"neither TMPDIR {tmpdir} nor any of {', '.join(_SHORT)} can hold sockets: set TMPDIR to a "
        f"folder of at most {_LONGEST} plain letters"
    )
