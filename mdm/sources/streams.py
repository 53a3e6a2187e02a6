"""Streaming pieces that several layouts share: tar members and JSON lines, with strict errors."""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# A single picture or line beyond these is refused, so that one bad file cannot exhaust the memory.
MAX_MEMBER_BYTES = 256 << 20
MAX_LINE_BYTES = 16 << 20

ARCHIVE_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error)


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged header after the first member for the end; here it is an error."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("InvalidHeaderError", "TruncatedHeaderError"):
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


def tar_members(file: IO[bytes] | io.IOBase, *, streaming: bool) -> Iterator[Member]:
    """Every regular file of a tar, in order; folders are passed over.

    A member that cannot be used is yielded with its problem. Raises one of ARCHIVE_ERRORS where
    the archive itself ends early or is damaged: what lies behind is out of reach.
    """
    mode = "r|" if streaming else "r:"
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictHeader) as tar:  # type: ignore[call-overload]
        for info in tar:
            name = info.name.removeprefix("./")
            if info.isdir():
                continue
            if not info.isfile():
                yield Member(name, None, "tar member is a link or a device, not a file")
            elif name.startswith("/") or ".." in name.split("/"):
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
    with gzip.open(path, "rb") as file:
        yield from tar_members(file, streaming=True)
        while file.read(1 << 20):  # padding; the last read compares the checksum
            pass


def tgz_lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(member, line number from 1, line) of every .jsonl file in a gzipped tar.

    Raises one of ARCHIVE_ERRORS.
    """
    with (
        gzip.open(path, "rb") as file,
        tarfile.open(fileobj=file, mode="r|", tarinfo=_StrictHeader) as tar,
    ):
        for info in tar:
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
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"line holds {_kind(row)}, not an object")
    return row


def text_field(value: Any, name: str) -> str:
    """`value` as usable text; ValueError for an absent, wrong or empty one."""
    if value is None:
        raise ValueError(f"field {name} is absent")
    if not isinstance(value, str):
        raise ValueError(f"field {name} is {_kind(value)}, not text")
    if not value.strip():
        raise ValueError(f"field {name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {name} holds half a surrogate pair, not valid Unicode") from None
    return value


def _kind(value: Any) -> str:
    return {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }[type(value)]
