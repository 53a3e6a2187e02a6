"""Streaming pieces that several layouts share: tar members and lines, with strict errors.

Nothing is ever extracted to disk. What is held in memory has limits, whatever an archive claims:
members, lines and headers. What is read as a stream may unpack to any size.
"""

import gzip
import io
import json
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from mdm.sources.fields import kind
from mdm.sources.record import one_record
from mdm.sources.textfile import check_utf8, decode_line, is_blank, is_clutter

# A single image or line beyond these is refused, so that one bad file cannot exhaust the memory.
# An uncompressed image of 64 Mi pixels, the most that are decoded, in four channels of 16 bits.
MAX_MEMBER_BYTES = 576 << 20
MAX_LINE_BYTES = 16 << 20
# An image of one colour packs as well as zeros do, so up to the size of 64 Mi pixels in four
# channels of 8 bits the ratio says nothing. Larger files that packed better are bombs.
FREE_BYTES = 288 << 20
MAX_RATIO = 200
# tarfile reads a header's extension (a long name, PAX fields) into memory whatever its size.
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
    """ValueError for a file that must not be unpacked into memory, `what` it is by name."""
    if unpacked > FREE_BYTES and unpacked > MAX_RATIO * packed:
        raise ValueError(f"decompression bomb: {packed} bytes unpack to {unpacked}")
    if unpacked > MAX_MEMBER_BYTES:
        raise ValueError(f"{what} of {unpacked} bytes is too large")


class DamagedHeaderError(tarfile.ReadError):
    """A member's header with a wrong checksum, or numbers that are none; `name` as it says."""

    def __init__(self, error: tarfile.HeaderError, block: bytes | bytearray) -> None:
        super().__init__(str(error))
        name = bytes(block[:100]).partition(b"\0")[0].decode("ascii", "replace")
        self.name = name if name.isascii() and name.isprintable() else ""


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged header after the first member for the end; here it is an error.

    So is a header whose extension asks for more memory than any name needs.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise DamagedHeaderError(error, buf) from None
        if header.type in _EXTENSIONS and not 0 <= header.size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"tar header asks for {header.size} bytes of names")
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictHeader":
        try:
            with one_record(passing=ARCHIVE_ERRORS):
                return super().fromtarfile(tarfile_)
        except ValueError as error:  # PAX fields that are no numbers
            raise DamagedHeaderError(tarfile.HeaderError(str(error)), b"") from None
        except tarfile.HeaderError as error:
            if type(error).__name__ == "TruncatedHeaderError":
                raise tarfile.ReadError(str(error)) from None
            raise  # the two ends of an archive: zero blocks, or no more bytes


class Slice(io.RawIOBase):
    """Bytes [start, stop) of an open file, as a file of their own."""

    def __init__(self, file: IO[bytes], start: int, stop: int) -> None:
        self._file, self._start, self._size = file, start, stop - start
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the slice."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Position within the slice."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, never past the slice's end."""
        self._file.seek(self._start + self._at)
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(frozen=True)
class Member:
    """A regular file in an archive; `data` is None where `problem` says why."""

    name: str
    data: bytes | None
    problem: str = ""


def describe(error: BaseException) -> str:
    """An error as part of a reason: its text, or its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


class _Unpacked(gzip.GzipFile):
    """A gzip stream: what was unpacked before it breaks off is given first, then the error."""

    def read(self, size: int | None = -1) -> bytes:
        """As gzip."""
        return super().read(size) if size is None or size < 0 else b"".join(self._parts(size))

    def _parts(self, size: int) -> Iterator[bytes]:
        given = 0
        while given < size:
            try:
                part = self.read1(size - given)
            except ARCHIVE_ERRORS:
                if not given:
                    raise
                return
            if not part:
                return
            yield part
            given += len(part)


@contextmanager
def open_gzip(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked stream of a gzip file. Read it in pieces: it may be of any size."""
    with path.open("rb") as packed, _Unpacked(fileobj=packed, mode="rb") as file:
        yield cast(IO[bytes], file)


@contextmanager
def open_tar(file: IO[bytes] | io.IOBase, *, streaming: bool) -> Iterator[tarfile.TarFile]:
    """A tar with strict headers. Take its members from `headers`."""
    mode = "r|" if streaming else "r:"
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictHeader) as tar:  # type: ignore[call-overload]
        yield tar


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member's header, forgotten once it is passed: tarfile would keep them all."""
    while (info := tar.next()) is not None:
        yield info
        cast(Any, tar).members.clear()


def surviving_headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | DamagedHeaderError]:
    """As `headers`, but behind a damaged one, which comes as its error, with the next whole one.

    Headers stand at multiples of 512 bytes, and no other bytes have their checksum. What file
    managers leave about (`is_clutter`) is passed over.
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
            # Behind damage a block of zeros may be a lost member's: only the file's end counts.
            if not damaged or plain.fileobj.tell() <= plain.offset:
                return
            searching = True
        plain.offset += tarfile.BLOCKSIZE


def read_file(path: Path) -> bytes:
    """A picture's bytes; ValueError where it is missing, too large or no regular file."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            os.scandir(path).close()  # says so where it may not be entered
            raise ValueError("a folder in a picture's place")
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")  # to open a pipe would wait for ever
        check_member(found.st_size, found.st_size, "file")
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError("missing file" + " behind a link" * path.is_symlink()) from None
    except OSError as error:
        raise ValueError(f"unreadable file: {describe(error)}") from None


def is_inside(name: str) -> bool:
    """Whether a published name stays below the folder it is taken from."""
    return not (name.startswith("/") or ".." in name.split("/") or "\0" in name)


def tar_members(file: IO[bytes] | io.IOBase, *, streaming: bool) -> Iterator[Member]:
    """Every regular file of a tar, in order; folders are passed over.

    A member that cannot be used is yielded with its problem. Raises one of ARCHIVE_ERRORS where
    the archive itself ends early or is damaged: what lies behind is out of reach.
    """
    with open_tar(file, streaming=streaming) as tar:
        for number, info in enumerate(surviving_headers(tar)):
            if isinstance(info, DamagedHeaderError):
                lost = info.name.removeprefix("./") or f"member {number}"
                yield Member(lost, None, f"damaged tar header: {describe(info)}")
                continue
            name = info.name.removeprefix("./")
            if info.isdir():
                continue
            if not info.isfile():
                yield Member(name, None, "tar member is a link or a device, not a file")
            elif info.issparse():
                yield Member(name, None, "tar member is a sparse file, not a whole one")
            elif not is_inside(name):
                yield Member(name, None, "tar member's name points outside the archive")
            elif problem := _too_large(info):
                yield Member(name, None, problem)
            else:
                content = tar.extractfile(info)
                assert content is not None
                data = content.read()
                if len(data) < info.size:
                    raise tarfile.ReadError(
                        f"unexpected end of data in {name}: {len(data)} of {info.size} bytes"
                    )
                yield Member(name, data)


def _too_large(info: tarfile.TarInfo) -> str:
    """Why a tar's member must not be held in memory; "" if it may."""
    try:
        check_member(info.size, info.size, "tar member")  # what it was packed to is not known
    except ValueError as error:
        return str(error)
    return ""


def tgz_members(path: Path) -> Iterator[Member]:
    """Every regular file of a gzipped tar; the gzip checksum is verified at its end.

    Raises one of ARCHIVE_ERRORS, as `tar_members`.
    """
    with open_gzip(path) as file:
        yield from tar_members(file, streaming=True)
        while file.read(1 << 20):  # padding; the last read compares the checksum
            pass


def tgz_lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(member, line number from 1, line) of every .jsonl file in a gzipped tar.

    Raises one of ARCHIVE_ERRORS, also for UTF-16.
    """
    with open_gzip(path) as file, open_tar(file, streaming=True) as tar:
        for info in headers(tar):
            name = info.name.removeprefix("./")
            if not info.isfile() or not name.endswith(".jsonl") or is_clutter(name):
                continue
            content = cast(io.BufferedReader, tar.extractfile(info))
            check_utf8(content.peek(4))
            for number, line in enumerate(bounded_lines(content), start=1):
                yield name, number, line
            if content.tell() < info.size:
                raise tarfile.ReadError(f"unexpected end of data in {name}")


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of a file; one longer than MAX_LINE_BYTES comes cut just beyond that length."""
    return (line for _, line in lines_at(file))


def lines_at(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from where the file stands, as `bounded_lines`; LF, CRLF or CR ends a line."""
    offset, rest = file.tell(), b""
    while data := rest + file.readline(MAX_LINE_BYTES + 1):
        lines = data.splitlines(keepends=True)
        # What has no end yet goes on in what comes next, or is the last line.
        rest = lines.pop() if len(lines) > 1 and not lines[-1].endswith((b"\n", b"\r")) else b""
        for line in lines:
            yield offset, line
            offset += len(line)
        while len(data) > MAX_LINE_BYTES and not (rest or data.endswith((b"\n", b"\r"))):
            data = file.readline(MAX_LINE_BYTES + 1)  # more of the line that was cut
            line, *others = data.splitlines(keepends=True) or [b""]
            offset += len(line)
            rest = b"".join(others)


def read_lines(data: bytes, name: str) -> list[str]:
    """The lines of a small file, without blanks around them; ValueError names it if it is bad."""
    lines: list[str] = []
    try:
        check_utf8(data[:4])
        for line in bounded_lines(io.BytesIO(data)):
            lines.append("" if is_blank(line) else decode_line(line).strip())
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}:{len(lines) + 1}: {error}") from None
    return lines


def parse_row(line: bytes) -> dict[str, Any]:
    """A JSON object from one line; ValueError says what is wrong with it."""
    if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise ValueError(f"line is longer than {MAX_LINE_BYTES} bytes")
    text = decode_line(line).rstrip()  # of any white space: JSON knows four kinds
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise ValueError("invalid JSON: a number of thousands of digits") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"line holds {kind(row)}, not an object")
    return row
