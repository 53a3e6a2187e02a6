"""Files as published: loose in folders, or packed in the archives offered for download.

`archive.zip::member` names a packed file. An archive is treated as if it had been extracted next to
itself: `coco/train2017.zip` with a member `train2017/1.jpg` holds `coco/train2017/1.jpg`. Zips are
read member by member, gzipped tars from start to end; nothing is unpacked to disk.
"""

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from mdm.sources import streams
from mdm.sources.record import attempt, fingerprint
from mdm.sources.streams import Member, describe
from mdm.sources.textfile import check_utf8, is_clutter

ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, zlib.error)
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".jpe", ".jfif")
EXTENSIONS = (*_EXTENSIONS, *map(str.upper, _EXTENSIONS), *map(str.title, _EXTENSIONS), "")


def locate(source: str, root: Path, *names: str) -> str:
    """The first of these files that exists, loose or packed; ValueError names them all."""
    for name in names:
        archive, _, member = name.partition("::")
        if (root / archive).is_file() and (not member or _has_member(root / archive, member)):
            return name
    raise ValueError(f"{source}: none of these files in {root}: {', '.join(names)}")


@contextmanager
def open_file(root: Path, name: str) -> Iterator[IO[bytes]]:
    """A text file, loose or packed, as a stream; seeking back in a packed one reads it again.

    Raises OSError with the reason if it cannot be read, also for UTF-16.
    """
    archive, _, member = name.partition("::")
    path = root / archive
    with ExitStack() as stack:
        try:
            if not member:
                file: Any = stack.enter_context(path.open("rb"))
            elif archive.endswith(".zip"):
                packed = stack.enter_context(zipfile.ZipFile(path))
                info = packed.getinfo(member)
                _check_packing(info)
                file = stack.enter_context(packed.open(info))
            else:
                packed_tar = streams.open_tar(stack.enter_context(streams.Unpacked(path)))
                file = _tar_member(stack.enter_context(packed_tar), member)
            head = file.peek(4)
        except (*ZIP_ERRORS, tarfile.TarError, KeyError) as error:
            raise OSError(f"{name}: {describe(error)}") from None
        check_utf8(head)
        try:
            yield file
        except zipfile.BadZipFile as error:  # a wrong checksum, found while reading
            raise OSError(f"{name}: {describe(error)}") from None


def unpacked_size(root: Path, name: str) -> int:
    """Bytes of a loose or packed file, as read through `open_file`."""
    archive, _, member = name.partition("::")
    if not member:
        return (root / archive).stat().st_size
    if archive.endswith(".zip"):
        with zipfile.ZipFile(root / archive) as packed:
            return packed.getinfo(member).file_size
    with open_file(root, name) as file:
        return file.seek(0, os.SEEK_END)


def listing(
    source: str, root: Path, folders: Sequence[str], archives: Sequence[str]
) -> tuple[str, int]:
    """(sha256 of names and sizes, total bytes) of all image files; ValueError if there are none."""
    files = [file for folder in folders for file in list_files(root, folder)]
    files += [(a, (root / a).stat().st_size) for a in archives if (root / a).is_file()]
    if not files:
        choices = ", ".join([*(f"{folder}/" for folder in folders), *archives])
        raise ValueError(f"{source}: no images in {root}; put one of these there: {choices}")
    return fingerprint(files), sum(size for _, size in files)


def list_files(root: Path, folder: str) -> Iterator[tuple[str, int]]:
    """(path below `root`, bytes) of every file below a folder, in a fixed order.

    The clutter of file managers (`is_clutter`) is skipped. A broken link has 0 bytes.
    """
    for parent, subfolders, names in os.walk(root / folder):
        subfolders[:] = sorted(name for name in subfolders if not is_clutter(name))
        for name in sorted(name for name in names if not is_clutter(name)):
            path = os.path.join(parent, name)
            size = os.stat(path).st_size if os.path.isfile(path) else 0
            yield os.path.relpath(path, root), size


def read_file(path: Path) -> bytes:
    """An image's bytes; ValueError if it is missing, too large or not a regular file."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()  # raises if the folder may not be read
            raise ValueError("a folder in place of an image")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")  # opening a pipe would block forever
        streams.check_member(status.st_size, status.st_size, "file")
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError("missing file" + ": broken symbolic link" * path.is_symlink()) from None
    except OSError as error:
        raise ValueError(f"unreadable file: {describe(error)}") from None


def _member(place: str, read: Callable[..., bytes], *arguments: Any) -> Member:
    """The file at `place`, with the bytes that `read` returns or the problem that it raises."""
    data = attempt(place, read, *arguments)
    return Member(place, None, str(data)) if isinstance(data, ValueError) else Member(place, data)


def read_files(root: Path, files: Iterable[str]) -> Iterator[Member]:
    """Loose image files, each with its bytes or the problem with it."""
    for file in files:
        yield _member(file, read_file, root / file)


class Images(ExitStack):
    """The images that annotations refer to, in folders and zips; each zip is opened once."""

    def __init__(self, root: Path, archives: Sequence[str]) -> None:
        super().__init__()
        self._root = root
        self._zips: list[tuple[str, zipfile.ZipFile]] = []
        self._damage = ""
        self._last: tuple[tuple[str, ...], Member] = (), Member("", None)
        for archive in archives:
            if archive.endswith(".zip") and (root / archive).is_file():
                try:
                    packed = self.enter_context(zipfile.ZipFile(root / archive))
                    self._zips.append((archive, packed))
                except ZIP_ERRORS as error:
                    self._damage += f"; archive {archive} is unreadable: {describe(error)}"

    def read(self, names: tuple[str, ...]) -> Member:
        """The first of `names` that exists, or a member with "" as its name and the problem."""
        if names != self._last[0]:  # the records of one image come together
            self._last = names, self._read(names)
        return self._last[1]

    def _read(self, names: tuple[str, ...]) -> Member:
        for name in names:
            if "\0" in name:
                return Member("", None, f"image path holds a zero byte: {name[:80]!r}")
            if not streams.is_inside(name):
                return Member("", None, f"image path points outside the data set: {name[:80]!r}")
            if image := self._read_exact(name):
                return image
        # A download may have the extension of its address, of its content or of a conversion.
        for stem in dict.fromkeys(without_extension(name) for name in names):
            for name in (stem + extension for extension in EXTENSIONS):
                tried = name in names or (self._root / name).is_dir()
                if not tried and (image := self._read_exact(name)):
                    return image
        return Member("", None, f"missing file: {names[0][:200]}{self._damage}")

    def _read_exact(self, name: str) -> Member | None:
        """The image of exactly this name, if any."""
        try:
            os.lstat(self._root / name)
            return _member(name, read_file, self._root / name)
        except PermissionError as error:  # of a folder above it
            return Member(name, None, f"unreadable file: {describe(error)}")
        except OSError:  # no such file, or a name that no file can have
            pass
        for archive, packed in self._zips:
            folder = PurePosixPath(archive).parent
            if PurePosixPath(name).is_relative_to(folder):
                member = str(PurePosixPath(name).relative_to(folder))
                if member in packed.NameToInfo:
                    return _member(f"{archive}::{member}", _unzip, packed, member)
        return None


def without_extension(name: str) -> str:
    """An image's name without the extension of an image file, if it has one."""
    stem, extension = os.path.splitext(name)
    return stem if extension.casefold() in _EXTENSIONS else name


def _unzip(packed: zipfile.ZipFile, member: str) -> bytes:
    """A member's bytes, with verified checksum; ValueError says what is wrong with it."""
    info = packed.NameToInfo[member]
    _check_packing(info)
    streams.check_member(info.file_size, info.compress_size, "archive member")
    try:
        with packed.open(info) as file:
            # In chunks: a single read unpacks everything, whatever size the header claims.
            return b"".join(iter(lambda: file.read(1 << 20), b""))
    except ZIP_ERRORS as error:
        raise ValueError(f"damaged archive member: {describe(error)}") from None


def _check_packing(info: zipfile.ZipInfo) -> None:
    """Raise ValueError if a member cannot be unpacked."""
    if info.flag_bits & 1:
        raise ValueError("archive member is encrypted")
    if (method := info.compress_type) not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"archive member is packed by method {method}, not by deflate")


def _has_member(path: Path, member: str) -> bool:
    if not path.name.endswith(".zip"):
        return True  # only a full read would tell; `open_file` raises if it is missing
    try:
        with zipfile.ZipFile(path) as packed:
            return member in packed.NameToInfo
    except ZIP_ERRORS as error:
        raise ValueError(f"{path}: unreadable: {describe(error)}") from None


def _tar_member(tar: tarfile.TarFile, member: str) -> IO[bytes]:
    for info in streams.headers(tar):
        if info.isfile() and info.name.removeprefix("./") == member:
            return cast(IO[bytes], tar.extractfile(info))
    raise KeyError(f"there is no {member} in it")
