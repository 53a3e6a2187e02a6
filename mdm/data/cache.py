"""A node's cache of remote bytes: files on a local disk, shared by its ranks, of bounded size.

Nothing runs beside the ranks: files appear whole by a rename, locks are the kernel's (`flock`) and
end with their holder, and the time of a file's last use is its modification time. What is read
here is for the caller to verify, so that neither a crash nor a bad disk can pass wrong bytes on.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger("mdm")

LOCKS = 256  # names share them: a fetch may wait for another one's, seldom
ROOM = 0.9  # share of the limit that is left after files were dropped, so that it is done seldom
_TEMPORARY, _INDEX, _TOTAL = ".tmp-", "index", "bytes"


class NodeCache:
    """At most `limit` bytes of named, immutable files below `folder`.

    ValueError if the folder cannot be made or written. A disk that is full, or fails later on,
    costs the cache and not the run: `is_full` becomes true, and one warning says so.
    """

    def __init__(self, folder: Path | str, limit: int) -> None:
        self.folder = Path(folder).absolute()
        self.limit = limit
        self.is_full = False
        self._files, self._locks = self.folder / "files", self.folder / "locks"
        try:
            for made in (self._files, self._locks):
                made.mkdir(parents=True, exist_ok=True)
            for lock in (_INDEX, *range(LOCKS)):  # later there may be no room for them
                (self._locks / str(lock)).touch()
            with self.lock(_INDEX):
                self._sweep()
                self._drop_oldest(0, limit)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._give_up(error)
                return
            raise ValueError(
                f"data.cache_dir {self.folder} cannot be used: {error.strerror or error}"
            ) from None

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Alone with this name among all threads and processes of the node."""
        number = _INDEX if name == _INDEX else str(zlib.crc32(name.encode()) % LOCKS)
        handle = os.open(self._locks / number, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def read(self, name: str, offset: int, length: int) -> bytes | None:
        """Bytes of a file, as many as there are; None if the file is not there."""
        try:
            handle = os.open(self._files / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            os.utime(handle)
            return os.pread(handle, length, offset)
        except OSError:  # a disk that cannot read is one that does not have it
            return b""
        finally:
            os.close(handle)

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Keep these bytes, in one file; the least recently used files make room for it."""
        if self.is_full:
            return
        size = sum(map(len, parts))
        aside = self._files / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with contextlib.ExitStack() as stack:
                with self.lock(_INDEX):
                    self._reserve(size)
                    file = stack.enter_context(open(aside, "xb", buffering=0))
                    fcntl.flock(file, fcntl.LOCK_SH)  # while it is held, `_sweep` lets it be
                    os.posix_fallocate(file.fileno(), 0, size)
                for part in parts:
                    rest = memoryview(part)
                    while len(rest):
                        rest = rest[file.write(rest) :]
                aside.replace(self._files / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.is_full = True
        log.warning(
            "data.cache_dir %s takes no more (%s): going on without it; what is read again "
            "comes from the store again. Free space and start anew to use it",
            self.folder,
            error.strerror or error,
        )

    def drop(self, name: str) -> None:
        """Remove a file whose bytes are wrong."""
        with contextlib.suppress(OSError):
            (self._files / name).unlink()

    def _reserve(self, size: int) -> None:
        """Count `size` more bytes, after making room if they pass the limit."""
        note = self.folder / _TOTAL
        try:
            total = int(note.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            total = self.limit + 1  # not known: count
        if total + size > self.limit:
            self._drop_oldest(size, int(self.limit * ROOM))
        else:
            note.write_text(str(total + size))

    def _drop_oldest(self, size: int, limit: int) -> None:
        """Count the files; drop the least recently used until `size` more are within `limit`."""
        found, total = [], 0
        for entry in os.scandir(self._files):
            with contextlib.suppress(FileNotFoundError):
                hidden = entry.name.startswith(".") and not entry.name.startswith(_TEMPORARY)
                if hidden or not entry.is_file(follow_symlinks=False):
                    continue  # other people's: neither counted nor dropped
                stat = entry.stat()
                total += stat.st_size
                if not entry.name.startswith(_TEMPORARY):  # others are being written
                    found.append((stat.st_mtime_ns, entry.path, stat.st_size))
        if total + size > self.limit:
            for _, path, length in sorted(found):
                if total + size <= limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= length
        (self.folder / _TOTAL).write_text(str(total + size))

    def _sweep(self) -> None:
        """Remove what killed writers left half-written."""
        for path in self._files.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
