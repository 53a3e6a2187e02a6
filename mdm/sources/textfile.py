"""Text files with byte order marks or any line endings, and the clutter that file managers leave.

Text is UTF-8. A byte order mark, CRLF or lone CR, white space at the end of a line, blank lines and
a missing final line ending change no record. UTF-16 is an error that gives the command to convert
it. A line is held in memory, so its length is limited.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from mdm.sources.fields import kind

# A longer line is refused, so that one bad file cannot exhaust the memory.
MAX_LINE_BYTES = 16 << 20
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# White space, the bytes of a byte order mark, and DOS's end-of-file character.
_BLANK = b" \t\r\n\x0b\x0c\x1a\xef\xbb\xbf"
_NO_BREAK_SPACE = "\xa0".encode()
# Folders and files that macOS, Windows, a NAS or an editor creates beside a user's own.
_CLUTTER = re.compile(
    r"\._.*|__macosx|\.ds_store|\.apdisk|\.appledouble|\.documentrevisions-v100|\.fseventsd"
    r"|\.localized|\.spotlight-v100|\.temporaryitems|\.trashes|icon\r"
    r"|thumbs\.db|ehthumbs(_vista)?\.db|desktop\.ini|\$recycle\.bin|system volume information"
    r"|@eadir|\.directory|\.ipynb_checkpoints",
    re.IGNORECASE | re.DOTALL,
)


class NotUtf8Error(OSError):
    """The whole file is in another encoding."""


def is_clutter(name: str) -> bool:
    """Whether any part of a path is the clutter of a file manager, not data: `._a.jpg`, ..."""
    return any(map(_CLUTTER.fullmatch, re.split(r"[\\/]", name)))


def check_utf8(head: bytes) -> None:
    """Raise NotUtf8Error if a file that begins with these four bytes is UTF-16 or UTF-32."""
    # Without a mark, every other byte of ASCII in UTF-16 is zero, and text contains no zero bytes.
    zeros = [byte == 0 for byte in head[:4]]
    unmarked = zeros in ([True, False, True, False], [False, True, False, True]) and all(
        32 <= byte < 127 or byte in b"\t\r\n" for byte in head[:4] if byte
    )
    if head.startswith(_UTF16) or unmarked:
        raise NotUtf8Error(
            "the file is UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8"
        )


def is_blank(line: bytes) -> bool:
    """Whether a line holds only white space."""
    return not line.replace(_NO_BREAK_SPACE, b"").strip(_BLANK)


def decode_line(line: bytes) -> str:
    """The text of a line without its ending or byte order mark.

    Raises ValueError if it is not UTF-8 or was cut by `lines_with_offsets`.
    """
    if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise ValueError(f"line is longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from None
    return text.lstrip("\ufeff").rstrip("\r\n\x1a")


def lines_with_offsets(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the file's current position on; LF, CRLF or CR ends a line.

    A line longer than MAX_LINE_BYTES is cut just beyond that length.
    """
    offset, partial = file.tell(), b""
    while data := partial + file.readline(MAX_LINE_BYTES + 1):
        lines = data.splitlines(keepends=True)
        # A last line without an ending continues in the next read, or ends the file.
        ended = lines[-1].endswith((b"\n", b"\r"))
        partial = lines.pop() if len(lines) > 1 and not ended else b""
        for line in lines:
            yield offset, line
            offset += len(line)
        while len(data) > MAX_LINE_BYTES and not (partial or data.endswith((b"\n", b"\r"))):
            data = file.readline(MAX_LINE_BYTES + 1)  # more of the line that was cut
            line, *others = data.splitlines(keepends=True) or [b""]
            offset += len(line)
            partial = b"".join(others)


def read_lines(data: bytes, name: str) -> list[str]:
    """The lines of a small file, stripped; ValueError names the file and the line that is bad."""
    lines: list[str] = []
    try:
        check_utf8(data[:4])
        for _, line in lines_with_offsets(io.BytesIO(data)):
            lines.append("" if is_blank(line) else decode_line(line).strip())
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}:{len(lines) + 1}: {error}") from None
    return lines


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object on one line; ValueError says what is wrong with it."""
    text = decode_line(line).rstrip()  # of all white space: JSON allows only four kinds
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise ValueError("invalid JSON: a number of thousands of digits") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"line holds {kind(value)}, not an object")
    return value
