"""Streaming pieces that several layouts share: tar members and JSON lines, with strict errors.

Nothing is ever extracted to disk, and what an archive claims decides neither how much memory nor
how much time it gets: members, lines and headers have limits, and a stream that unpacks to more
than MAX_RATIO times its bytes is a decompression bomb.
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

# A single picture or line beyond these is refused, so that one bad file cannot exhaust the memory.
MAX_MEMBER_BYTES = 256 << 20
MAX_LINE_BYTES = 16 << 20
# Pictures hardly pack at all and annotations about 20:1; deflate's limit is 1032:1. Short streams
# may be anything.
MAX_RATIO = 200
FREE_BYTES = 16 << 20
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


def check_ratio(unpacked: int, packed: int) -> None:
    """OSError where so many bytes cannot come from honest data."""
    if unpacked > FREE_BYTES + MAX_RATIO * packed:
        raise OSError(f"decompression bomb: {packed} bytes unpack to {unpacked} or more")


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
    """A gzip stream that stops at a decompression bomb."""

    def __init__(self, packed: IO[bytes]) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed

    def read(self, size: int | None = -1) -> bytes:
        """As gzip; OSError where the stream unpacks to far too much.

        What was unpacked before the stream breaks off is given first, the error afterwards.
        """
        data = super().read(size) if size is None or size < 0 else b"".join(self._parts(size))
        check_ratio(self.tell(), self._packed.tell())
        return data

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

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As gzip; the way forward is read piece by piece, and so is limited, too."""
        ahead = offset - self.tell() if whence == io.SEEK_SET else 0
        while ahead > 0 and (data := self.read(min(ahead, 1 << 20))):
            ahead -= len(data)
        return super().seek(offset, whence)


@contextmanager
def open_gzip(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked stream of a gzip file. Read it in pieces: the limit is checked after each."""
    with path.open("rb") as packed, _Unpacked(packed) as file:
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

    Headers stand at multiples of 512 bytes, and no other bytes have their checksum.
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
        if found.st_size > MAX_MEMBER_BYTES:
            raise ValueError(f"file of {found.st_size} bytes is too large")
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
            elif info.size > MAX_MEMBER_BYTES:
                yield Member(name, None, f"tar member of {info.size} bytes is too large")
            else:
                content = tar.extractfile(info)
                assert content is not None
                data = content.read()
                if len(data) < info.size:
                    raise tarfile.ReadError(
                        f"unexpected end of data in {name}: {len(data)} of {info.size} bytes"
                    )
                yield Member(name, data)


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

    Raises one of ARCHIVE_ERRORS.
    """
    with open_gzip(path) as file, open_tar(file, streaming=True) as tar:
        for info in headers(tar):
            if not (info.isfile() and info.name.endswith(".jsonl")):
                continue
            content = tar.extractfile(info)
            assert content is not None
            name = info.name.removeprefix("./")
            for number, line in enumerate(bounded_lines(content), start=1):
                yield name, number, line
            if content.tell() < info.size:
                raise tarfile.ReadError(f"unexpected end of data in {name}")


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of a file; one longer than MAX_LINE_BYTES comes cut just beyond that length."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        yield line


def parse_row(line: bytes) -> dict[str, Any]:
    """A JSON object from one line; ValueError says what is wrong with it."""
    if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise ValueError(f"line is longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")  # Windows' tools begin a file with it
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from None
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
