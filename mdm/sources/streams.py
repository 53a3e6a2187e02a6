"""Gzip and tar archives read as streams, with damage reported and memory bounded.

Nothing is ever extracted to disk. Members and headers that would be held in memory are limited in
size, whatever an archive claims. What is read as a stream may unpack to any size.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from mdm.sources.record import one_record
from mdm.sources.textfile import NotUtf8Error, check_utf8, is_blank, is_clutter, lines_with_offsets

# A larger image is refused, so that one bad file cannot exhaust the memory. This is the size of an
# uncompressed image of 64 Mi pixels, the most that are decoded, in four channels of 16 bits.
MAX_MEMBER_BYTES = 576 << 20
# An image of one colour compresses as well as zeros do, so up to the size of 64 Mi pixels in four
# channels of 8 bits the ratio proves nothing. Larger files that compress better are bombs.
FREE_BYTES = 288 << 20
MAX_RATIO = 200
# tarfile reads the extension of a header (a long name, PAX fields) into memory, whatever its size.
_MAX_HEADER_BYTES = 1 << 20
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

ARCHIVE_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error)


def check_member(unpacked: int, packed: int, what: str) -> None:
    """Raise ValueError if a file (`what` in messages) is too large to unpack into memory."""
    if unpacked > FREE_BYTES and unpacked > MAX_RATIO * packed:
        raise ValueError(f"decompression bomb: {packed} bytes unpack to {unpacked}")
    if unpacked > MAX_MEMBER_BYTES:
        raise ValueError(f"{what} of {unpacked} bytes is too large")


class DamagedHeaderError(tarfile.ReadError):
    """A member's header has a wrong checksum or malformed numbers; `name` is read from it."""

    def __init__(self, error: tarfile.HeaderError, block: bytes | bytearray) -> None:
        super().__init__(str(error))
        name = bytes(block[:100]).partition(b"\0")[0].decode("ascii", "replace")
        self.name = name if name.isascii() and name.isprintable() else ""


class _StrictHeader(tarfile.TarInfo):
    """A header that raises an error if damaged, where tarfile would end the archive silently.

    A header whose extension is larger than any name needs is an error, too.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise DamagedHeaderError(error, buf) from None
        if header.type in _EXTENSIONS and not 0 <= header.size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"tar header claims {header.size} bytes of names")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictHeader":
        try:
            with one_record(passing=ARCHIVE_ERRORS):
                return super().fromtarfile(tar)
        except ValueError as error:  # PAX fields that should be numbers
            raise DamagedHeaderError(tarfile.HeaderError(str(error)), b"") from None
        except tarfile.HeaderError as error:
            if type(error).__name__ == "TruncatedHeaderError":
                raise tarfile.ReadError(str(error)) from None
            raise  # the two ways an archive ends: zero blocks, or no more bytes


class Slice:
    """Bytes [start, stop) of an open file, with what tarfile needs of a file."""

    def __init__(self, file: IO[bytes], start: int, stop: int) -> None:
        self._file, self._start, self._stop = file, start, stop
        file.seek(start)

    def tell(self) -> int:
        """Position within the slice."""
        return self._file.tell() - self._start

    def seek(self, offset: int) -> None:
        """Move to a position within the slice."""
        self._file.seek(self._start + offset)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, never beyond the slice's end."""
        return self._file.read(max(0, min(size, self._stop - self._file.tell())))


@dataclass(frozen=True)
class Member:
    """A file, in an archive or loose; if `data` is None, `problem` says why."""

    name: str
    data: bytes | None
    problem: str = ""


def describe(error: BaseException) -> str:
    """An error as part of a reason: its message, or its type if it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


class Unpacked(gzip.GzipFile):
    """A gzip file that returns all bytes unpacked before an error, and then raises it.

    Read it in chunks: it may unpack to any size.
    """

    def read(self, size: int | None = -1) -> bytes:
        """As in gzip."""
        if size is None or size < 0:
            return super().read(size)
        data = b""
        try:
            while len(data) < size and (part := self.read1(size - len(data))):
                data += part
        except ARCHIVE_ERRORS:
            if not data:
                raise
        return data


@contextmanager
def expect_utf8(source: str, path: Path) -> Iterator[None]:
    """Turn NotUtf8Error inside the block into a ValueError; ignore others, which `read` reports."""
    try:
        yield
    except NotUtf8Error as error:
        raise ValueError(f"{source}: {path}: {describe(error)}") from None
    except ARCHIVE_ERRORS:
        pass


def open_tar(file: Any, *, streaming: bool = False) -> tarfile.TarFile:
    """A tar with strict headers. Iterate over its members with `headers`."""
    return tarfile.open(fileobj=file, mode="r|" if streaming else "r:", tarinfo=_StrictHeader)


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member's header, released after use: tarfile would keep them all."""
    while (info := tar.next()) is not None:
        yield info
        cast(Any, tar).members.clear()


def surviving_headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | DamagedHeaderError]:
    """As `headers`, but a damaged header is yielded as its error, followed by the next valid one.

    Headers lie at multiples of 512 bytes, and no other bytes match their checksum. The clutter of
    file managers (`is_clutter`) is skipped.
    """
    plain = cast(Any, tar)
    searching = damaged = False
    while True:
        try:
            info = tar.next()
        except DamagedHeaderError as error:
            if not searching:
                yield error
            searching = damaged = True
        else:
            if info is not None:
                searching = False
                if not is_clutter(info.name):
                    yield info
                plain.members.clear()
                continue
            # After damage, zero blocks may belong to a lost member: only the file's end counts.
            if not damaged or plain.fileobj.tell() <= plain.offset:
                return
            searching = True
        plain.offset += tarfile.BLOCKSIZE


def is_inside(name: str) -> bool:
    """Whether a published path stays below the folder it is relative to."""
    return not (name.startswith("/") or ".." in name.split("/") or "\0" in name)


def tar_members(file: Any, *, streaming: bool = False) -> Iterator[Member]:
    """Every regular file of a tar, in order, without folders.

    A member that cannot be used is yielded with its problem. Raises one of ARCHIVE_ERRORS if the
    archive itself ends early or is damaged: the rest of it cannot be read.
    """
    with open_tar(file, streaming=streaming) as tar:
        for number, info in enumerate(surviving_headers(tar)):
            name = info.name.removeprefix("./")
            if isinstance(info, DamagedHeaderError):
                problem = f"damaged tar header: {describe(info)}"
                yield Member(name or f"member {number}", None, problem)
            elif problem := _problem(info):
                yield Member(name, None, problem)
            elif not info.isdir():
                data = cast(IO[bytes], tar.extractfile(info)).read()
                if len(data) < info.size:
                    raise tarfile.ReadError(
                        f"unexpected end of data in {name}: {len(data)} of {info.size} bytes"
                    )
                yield Member(name, data)


def _problem(info: tarfile.TarInfo) -> str:
    """Why a tar member cannot be used; "" for a usable file and for a folder."""
    if info.isdir():
        return ""
    if not info.isfile():
        return "tar member is a link or a device, not a file"
    if info.issparse():
        return "tar member is a sparse file, not a whole one"
    if not is_inside(info.name.removeprefix("./")):
        return "tar member's name points outside the archive"
    try:
        check_member(info.size, info.size, "tar member")  # its compressed size is not known
    except ValueError as error:
        return str(error)
    return ""


def tgz_members(path: Path) -> Iterator[Member]:
    """Every regular file of a gzipped tar; the gzip checksum is verified at its end.

    Raises one of ARCHIVE_ERRORS, as `tar_members`.
    """
    with Unpacked(path) as file:
        yield from tar_members(file, streaming=True)
        while file.read(1 << 20):  # padding; the last read verifies the checksum
            pass


def tgz_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every .jsonl file in a gzipped tar, without blank lines.

    Raises one of ARCHIVE_ERRORS, also for UTF-16.
    """
    with Unpacked(path) as file, open_tar(file, streaming=True) as tar:
        for info in headers(tar):
            name = info.name.removeprefix("./")
            if not info.isfile() or not name.endswith(".jsonl") or is_clutter(name):
                continue
            content = cast(io.BufferedReader, tar.extractfile(info))
            check_utf8(content.peek(4))
            for number, (_, line) in enumerate(lines_with_offsets(content), start=1):
                if not is_blank(line):
                    yield number, line
            if content.tell() < info.size:
                raise tarfile.ReadError(f"unexpected end of data in {name}")
