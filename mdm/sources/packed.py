"""Files as published: loose in folders, or packed in the archive that the data set is offered as.

`archive.zip::member` names a packed file. An archive counts as if it had been extracted beside
itself: `coco/train2017.zip` with a member `train2017/1.jpg` holds `coco/train2017/1.jpg`. Zips are
read member by member, gzipped tars from front to back; nothing is unpacked to disk.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from mdm.sources.record import fingerprint
from mdm.sources.streams import (
    check_member,
    describe,
    headers,
    is_inside,
    open_gzip,
    open_tar,
    read_file,
)
from mdm.sources.textfile import check_utf8, is_clutter

ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    zlib.error,
)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".jpe", ".jfif")
EXTENSIONS = (*_EXTENSIONS, *map(str.upper, _EXTENSIONS), *map(str.title, _EXTENSIONS), "")


def locate(source: str, root: Path, *names: str) -> str:
    """The first of these files that is there, loose or packed; ValueError names them all."""
    for name in names:
        archive, _, member = name.partition("::")
        if (root / archive).is_file() and (not member or _holds(root / archive, member)):
            return name
    raise ValueError(f"{source}: none of these files in {root}: {', '.join(names)}")


@contextmanager
def open_file(root: Path, name: str) -> Iterator[IO[bytes]]:
    """A text file, loose or packed, as a stream; to seek back in a packed one reads it again.

    Raises OSError where it cannot be read, with the reason, also for UTF-16.
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
                _check(info)
                file = stack.enter_context(packed.open(info))
            else:
                packed_tar = open_tar(stack.enter_context(open_gzip(path)), streaming=False)
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
    """Bytes of a loose or packed file, as `open_file` gives them."""
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
    """(sha256 of names and sizes, bytes) of all pictures there; ValueError without any.

    What file managers leave about (`is_clutter`) is not among them.
    """
    entries: list[tuple[str, int]] = []
    for folder in folders:
        for here, below, names in os.walk(root / folder):
            below[:] = sorted(name for name in below if not is_clutter(name))
            for name in sorted(name for name in names if not is_clutter(name)):
                path = os.path.join(here, name)
                size = os.stat(path).st_size if os.path.isfile(path) else 0
                entries.append((os.path.relpath(path, root), size))
    entries += [(a, (root / a).stat().st_size) for a in archives if (root / a).is_file()]
    if not entries:
        wanted = ", ".join([*(f"{folder}/" for folder in folders), *archives])
        raise ValueError(f"{source}: no pictures in {root}; put one of these there: {wanted}")
    return fingerprint(entries), sum(size for _, size in entries)


class PictureError(ValueError):
    """A picture that is there and cannot be read; `place` is where."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(reason)
        self.place = place


class Pictures:
    """The pictures that annotations name, from folders and zips; each zip is opened once."""

    def __init__(self, root: Path, archives: Sequence[str]) -> None:
        self._root = root
        self._zips: list[tuple[str, zipfile.ZipFile]] = []
        self._damage = ""
        self._last: tuple[tuple[str, ...], tuple[str, bytes]] = ((), ("", b""))
        for archive in archives:
            if archive.endswith(".zip") and (root / archive).is_file():
                try:
                    self._zips.append((archive, zipfile.ZipFile(root / archive)))
                except ZIP_ERRORS as error:
                    self._damage += f"; archive {archive} is unreadable: {describe(error)}"

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *error: object) -> None:
        for _, packed in self._zips:
            packed.close()

    def read(self, names: tuple[str, ...]) -> tuple[str, bytes]:
        """(where it lies, bytes) of the first of `names` that is there; ValueError says why not.

        PictureError where it is there. Records of one picture come together: the last is kept.
        """
        if names != self._last[0]:
            self._last = (names, self._find(names))
        return self._last[1]

    def _find(self, names: tuple[str, ...]) -> tuple[str, bytes]:
        for name in names:
            if "\0" in name:
                raise ValueError(f"picture's name holds a zero byte: {name[:80]!r}")
            if not is_inside(name):
                raise ValueError(f"picture's name points outside the data set: {name[:80]!r}")
            if found := self._at(name):
                return found
        # Downloads have the extension of their address or of their content, or are converted.
        for stem in dict.fromkeys(without_extension(name) for name in names):
            for extension in EXTENSIONS:
                name = stem + extension
                tried = name in names or (self._root / name).is_dir()
                if not tried and (found := self._at(name)):
                    return found
        raise ValueError(f"missing file: {names[0][:200]}{self._damage}")

    def _at(self, name: str) -> tuple[str, bytes] | None:
        """What lies under this very name; PictureError where it cannot be read."""
        try:
            if _is_there(self._root / name):
                return name, read_file(self._root / name)
        except ValueError as error:
            raise PictureError(name, str(error)) from None
        for archive, packed in self._zips:
            folder = PurePosixPath(archive).parent
            if PurePosixPath(name).is_relative_to(folder):
                member = str(PurePosixPath(name).relative_to(folder))
                if member in packed.NameToInfo:
                    place = f"{archive}::{member}"
                    try:
                        return place, _unzip(packed, member)
                    except ValueError as error:
                        raise PictureError(place, str(error)) from None
        return None


def without_extension(name: str) -> str:
    """A picture's name without the extension of a picture, if it has one."""
    stem, extension = os.path.splitext(name)
    return stem if extension.casefold() in _EXTENSIONS else name


def _is_there(path: Path) -> bool:
    """Whether something has this name; ValueError where a folder on the way keeps it to itself."""
    try:
        os.lstat(path)
    except PermissionError as error:
        raise ValueError(f"unreadable file: {describe(error)}") from None
    except OSError:  # no such name, or one that no file can have
        return False
    return True


def _unzip(packed: zipfile.ZipFile, member: str) -> bytes:
    """A member's bytes, its checksum verified; ValueError says what is wrong with it."""
    info = packed.NameToInfo[member]
    try:
        _check(info)
    except OSError as error:
        raise ValueError(str(error)) from None
    check_member(info.file_size, info.compress_size, "archive member")
    try:
        with packed.open(info) as file:
            # In pieces: a whole read unpacks all there is, whatever the size that is claimed.
            return b"".join(iter(lambda: file.read(1 << 20), b""))
    except ZIP_ERRORS as error:
        raise ValueError(f"damaged archive member: {describe(error)}") from None


def _check(info: zipfile.ZipInfo) -> None:
    """OSError for a member that is not read, whatever it holds."""
    if info.flag_bits & 1:
        raise OSError("archive member is encrypted")
    if info.compress_type not in _METHODS:
        raise OSError(f"archive member is packed by method {info.compress_type}, not by deflate")


def _holds(path: Path, member: str) -> bool:
    if not path.name.endswith(".zip"):
        return True  # known only at its end; `open_file` says if it is not there
    try:
        with zipfile.ZipFile(path) as packed:
            return member in packed.NameToInfo
    except ZIP_ERRORS as error:
        raise ValueError(f"{path}: unreadable: {describe(error)}") from None


def _tar_member(tar: tarfile.TarFile, member: str) -> IO[bytes]:
    for info in headers(tar):
        if info.isfile() and info.name.removeprefix("./") == member:
            return cast(IO[bytes], tar.extractfile(info))
    raise KeyError(f"there is no {member} in it")
