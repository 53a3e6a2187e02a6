"""How every job begins and ends; imported first, because other imports take seconds.

Ctrl-C ends a job with exit code 130 and at most one line, a second one at once. A mistake, and a
file or folder that cannot be used, end it with one line and exit code 2. Characters that the
terminal cannot show are replaced, and a closed pipe ends a job silently.
"""

import atexit
import codecs
import functools
import getpass
import locale
import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import ParamSpec

from mdm.utils.exit_codes import INTERRUPTED, MISTAKE

P = ParamSpec("P")


def job(
    name: str, *mistakes: type[Exception], advice: str = ""
) -> Callable[[Callable[P, int | None]], Callable[P, int]]:
    """Decorate a job's `main`, which returns its exit code, or None for 0.

    Args:
        name: begins the line that says why the job ended.
        mistakes: errors that the user can fix, besides OSError: one line, exit code 2.
        advice: follows "interrupted".
    """
    expected: tuple[type[Exception], ...] = (OSError, *mistakes)

    def decorate(main: Callable[P, int | None]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            handled = signal.getsignal(signal.SIGINT) is _leave
            if handled:
                signal.signal(signal.SIGINT, _interrupt)
            try:
                code = main(*args, **kwargs) or 0
                if sys.stdout is not None:
                    sys.stdout.flush()
                return code
            except KeyboardInterrupt:
                if os.environ.get("RANK", "0") == "0":
                    sys.stderr.write(f"\n{name}: interrupted{advice}\n")
                return INTERRUPTED
            except expected as error:
                if isinstance(error, BrokenPipeError) and _is_unread():
                    return 1
                sys.stderr.write(f"{name}: {one_line(error)}\n")
                sys.exit(MISTAKE)
            finally:
                if handled:
                    signal.signal(signal.SIGINT, _leave)

        return run

    return decorate


def one_line(error: Exception) -> str:
    """An error in one line; for an OSError, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _is_unread() -> bool:
    """Whether standard output is closed at its other end; if so, it is discarded from now on."""
    readers = select.poll()
    readers.register(sys.stdout.fileno(), 0)
    if not readers.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return True


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave_aloud)
    raise KeyboardInterrupt


def _leave_aloud(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted again: ended at once\n")
    os._exit(INTERRUPTED)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def _begin() -> None:
    """Set up the process of a job."""
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        # Libraries read their own files in the locale's encoding, and fail on them.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, _leave)
    if not os.path.isdir(os.path.expanduser("~")):  # libraries read it when imported
        os.environ["HOME"] = folder = tempfile.mkdtemp(prefix="mdm-home-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        getpass.getuser()
    except KeyError:  # no entry in /etc/passwd, as in containers; torch.compile needs a name
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _is_job() -> bool:
    """Whether this process runs a file in `pipelines` or `examples`."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").absolute()
    root = Path(__file__).absolute().parents[2]
    return root / "pipelines" in path.parents or root / "examples" in path.parents


if _is_job():
    _begin()
