"""A folder as a store."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import xxhash

from mdm.storage import buffers
from mdm.storage.base import MissingObjectError, Store, StoreError, checked, is_folder_marker

_TEMPORARY = ".tmp-"
_ATTEMPTS = 10
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class LocalStore(Store):
    """A folder. Objects are written to a temporary file, flushed to disk, then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def put(  # noqa: D102
        self, key: str, data: bytes | memoryview, *, if_absent: bool = False
    ) -> bool:
        path = self.root / checked(key)
        if if_absent and path.exists():
            return False
        try:
            for _ in range(_ATTEMPTS - 1):
                with suppress(FileNotFoundError):
                    self._put(path, data, if_absent)
                    return True
            self._put(path, data, if_absent)
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
        return True

    def _put(self, path: Path, data: bytes | memoryview, if_absent: bool) -> None:
        """FileNotFoundError if another process swept or emptied the folder meanwhile."""
        aside = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            created = [parent for parent in path.parents if not parent.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _link(aside, path) if if_absent else os.replace(aside, path)
            for folder in (path.parent, *(parent.parent for parent in created)):
                handle = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        finally:
            with suppress(OSError):  # the error being raised matters more
                aside.unlink(missing_ok=True)

    def replace(self, key: str, data: bytes, etag: str) -> str | None:  # noqa: D102
        with suppress(MissingObjectError), _locked((self.root / checked(key)).parent):
            if self.read(key)[1] == etag:
                self.put(key, data)
                return _etag(data)
        return None

    def read(self, key: str) -> tuple[bytes, str]:  # noqa: D102
        path = self.root / checked(key)
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObjectError(f"{path} does not exist") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        return data, _etag(data)

    def read_range(self, key: str, offset: int, length: int) -> memoryview:  # noqa: D102
        path = f"{self.uri}/{checked(key)}"
        data, done = buffers.take(length).data, 0
        try:
            file = os.open(path, os.O_RDONLY)  # takes less than half the time of a file object
            try:
                while done < length and (more := os.preadv(file, [data[done:]], offset + done)):
                    done += more
            finally:
                os.close(file)
        except FileNotFoundError:
            raise MissingObjectError(f"{path} does not exist") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        if done != length:
            raise StoreError(f"{path} ends at byte {offset + done}, before {offset + length}")
        return data

    def listing(self, prefix: str = "") -> dict[str, int]:  # noqa: D102
        folder = self.root / checked(prefix).rpartition("/")[0]
        sizes: dict[str, int] = {}
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(_TEMPORARY):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        size = path.stat().st_size
                        if not is_folder_marker(key, size):
                            sizes[key] = size
        return dict(sorted(sizes.items()))

    def delete(self, key: str) -> None:  # noqa: D102
        path = self.root / checked(key)
        path.unlink(missing_ok=True)
        # S3 has no folders: remove those that are empty now.
        with suppress(OSError):  # of the first that is not
            for parent in takewhile(lambda parent: parent != self.root, path.parents):
                parent.rmdir()

    def sweep(self, *prefixes: str) -> None:  # noqa: D102
        for parent, folders, names in os.walk(self.root):
            at = "" if Path(parent) == self.root else f"{Path(parent).relative_to(self.root)}/"
            if not at:  # temporary files here are this store's own, whatever their key
                folders[:] = [name for name in folders if f"{name}/".startswith(prefixes)]
            for name in names:
                if name.startswith(_TEMPORARY) and (not at or at.startswith(prefixes)):
                    Path(parent, name).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Excludes other processes from this block; the kernel releases the lock of a killed one."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield  # no folder, no object to replace
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            # Lustre mounted without `flock` and some network file systems have no locks.
            if error.errno not in _NO_LOCKS:
                raise StoreError(f"cannot lock {folder}: {error.strerror}") from error
        yield
    finally:
        os.close(handle)


def _link(aside: Path, path: Path) -> None:
    """Gives a file its name; FileExistsError if that was taken in the meantime."""
    try:
        os.link(aside, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # exFAT and some FUSE and SMB mounts have no links: the process that creates the name wins.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(aside, path)


def _etag(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
