"""A node's cache of remote bytes: files on a local disk, shared by its ranks, of bounded size.

Nothing runs besides the ranks. Files appear whole by a rename, locks are the kernel's (`flock`) and
end with their holder, and a file's modification time is when it was last used. The caller verifies
what it reads, so neither a crash nor a bad disk can pass on wrong bytes.
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

LOCKS = 256  # shared by all names: rarely, a fetch waits for that of another name
ROOM = 0.9  # share of the limit that remains after files were dropped, so that it happens rarely
_TEMPORARY, _INDEX, _TOTAL = ".tmp-", "index", "bytes"


class NodeCache:
    """At most `limit` bytes of named, immutable files in `folder`.

    A disk that is full or fails later costs the cache but not the run: `is_full` becomes true, with
    one warning.

    Raises:
        ValueError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path | str, limit: int) -> None:
        self.folder = Path(folder).absolute()
        self.limit = limit
        self.is_full = False
        self._files, self._locks = self.folder / "files", self.folder / "locks"
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)
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
        """Excludes all other threads and processes of the node that lock this name."""
        number = _INDEX if name == _INDEX else str(zlib.crc32(name.encode()) % LOCKS)
        handle = os.open(self._locks / number, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def read(self, name: str, offset: int, length: int) -> bytes | None:
        """At most `length` bytes of a file; None if the file is missing."""
        try:
            handle = os.open(self._files / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            os.utime(handle)
            return os.pread(handle, length, offset)
        except OSError:  # a disk that cannot be read is treated as one without these bytes
            return b""
        finally:
            os.close(handle)

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Stores these bytes in one file, in place of the least recently used files."""
        if self.is_full:
            return
        size = sum(map(len, parts))
        aside = self._files / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with contextlib.ExitStack() as stack:
                with self.lock(_INDEX):
                    self._reserve(size)
                    file = stack.enter_context(open(aside, "xb"))
                    fcntl.flock(file, fcntl.LOCK_SH)  # keeps `_sweep` away from it
                    os.posix_fallocate(file.fileno(), 0, size)
                file.writelines(parts)
                file.flush()
                aside.replace(self._files / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.is_full = True
        log.warning(
            "data.cache_dir %s takes no more (%s): the run continues without it and reads from "
            "the store again what it needs again. Free space and restart to use it",
            self.folder,
            error.strerror or error,
        )

    def drop(self, name: str) -> None:
        """Removes a file whose bytes are wrong."""
        with contextlib.suppress(OSError):
            (self._files / name).unlink()

    def _reserve(self, size: int) -> None:
        """Counts `size` more bytes, after making room if they exceed the limit."""
        path = self.folder / _TOTAL
        try:
            total = int(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            total = self.limit + 1  # unknown: count the files
        if total + size > self.limit:
            self._drop_oldest(size, int(self.limit * ROOM))
        else:
            path.write_text(str(total + size), encoding="utf-8")

    def _drop_oldest(self, size: int, limit: int) -> None:
        """Counts the files; drops the least recently used until `size` more fit into `limit`."""
        files, total = [], 0
        for entry in os.scandir(self._files):
            with contextlib.suppress(FileNotFoundError):
                temporary = entry.name.startswith(_TEMPORARY)
                hidden = entry.name.startswith(".") and not temporary
                if hidden or not entry.is_file(follow_symlinks=False):
                    continue  # not ours: neither counted nor dropped
                stat = entry.stat()
                total += stat.st_size
                if not temporary:  # those are being written
                    files.append((stat.st_mtime_ns, entry.path, stat.st_size))
        if total + size > self.limit:
            for _, path, length in sorted(files):
                if total + size <= limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= length
        (self.folder / _TOTAL).write_text(str(total + size), encoding="utf-8")

    def _sweep(self) -> None:
        """Removes the partial files of killed writers."""
        for path in self._files.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
