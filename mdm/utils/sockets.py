"""A folder for Unix sockets, whose paths the kernel limits to 107 bytes."""

import atexit
import os
import re
import shutil
import tempfile
from functools import lru_cache

_LONGEST = 32  # bytes of a folder, so that what Ray makes of it stays within the limit
_SHORT = ("/tmp", "/dev/shm", "/var/tmp")


@lru_cache(maxsize=1)
def socket_folder() -> str | None:
    """A short folder of this process's own, removed at its end; None if TMPDIR serves.

    TMPDIR does not serve where its path is too long, or holds what is neither a letter or digit of
    ASCII nor one of `/._-`. ValueError where nothing short can be written either.
    """
    given = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(given) <= _LONGEST and re.fullmatch(r"[\w/.-]+", given, re.ASCII):
        return None
    for parent in _SHORT:
        try:
            folder = tempfile.mkdtemp(prefix="mdm-", dir=parent)
        except OSError:
            continue
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    raise ValueError(
        f"TMPDIR {given} does not serve for sockets, and nor does any of {', '.join(_SHORT)}: set "
        f"TMPDIR to a folder of at most {_LONGEST} plain letters"
    )
