"""Large JSON files read entry by entry: a list, an object of entries, or a list within an object.

Published annotations are one JSON value of up to gigabytes. Here a window slides over the file and
the standard parser takes one entry after another from it, so memory stays at one entry. The window
holds latin-1 text: one character a byte, so that positions are byte offsets and reading can begin
at any entry found before. A damaged entry is passed over by its brackets and quotes, and those
behind it still come.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from mdm.sources import streams
from mdm.sources.fields import kind

_WINDOW = 1 << 18
# An error so near the window's end may only mean that the entry goes on behind it.
_MARGIN = 16
_MAX_DEPTH = 10_000
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_MARK = re.compile(r'["\[\]{},]')
_IN_TEXT = re.compile(r'["\\]')
_BYTE_ORDER_MARK = "\xef\xbb\xbf"  # in latin-1


@dataclass(frozen=True)
class Element:
    """One entry: the byte where it begins, its key or "", its value or the `problem` with it."""

    offset: int
    name: str
    value: Any
    problem: str = ""


class BrokenFileError(ValueError):
    """The file is damaged so that nothing behind that place can be told apart."""


def elements(
    file: IO[bytes], section: str = "", start: int = 0, stop: int = sys.maxsize
) -> Iterator[Element]:
    """Entries that begin in bytes [start, stop) of the file's list or object, in its order.

    `section` names the list within an object that is meant instead. `start` is 0 or the offset of
    an entry. Raises BrokenFileError where the rest of the file is out of reach.
    """
    cursor = _Cursor(file, 0)
    opening = cursor.peek()
    if section:
        opening = "["
        if not start:
            _enter(cursor, section)
    elif opening in ("[", "{"):
        cursor.take()
    else:
        raise BrokenFileError(f"no JSON list or object: {_begins(opening)}")
    if start:
        cursor = _Cursor(file, start)
    named = opening == "{"
    for element in _items(cursor, named):
        if element.offset >= stop:
            return
        yield element
    rest = cursor.peek()
    if rest not in (("", ",", "}") if section else ("",)):
        raise BrokenFileError(
            f"invalid JSON at byte {cursor.offset}: {rest!r} behind the last entry"
        )


def _enter(cursor: "_Cursor", section: str) -> None:
    """Move behind the bracket that opens the section."""
    if (opening := cursor.peek()) != "{":
        raise BrokenFileError(f"no JSON object with a list {section!r}: {_begins(opening)}")
    cursor.take()
    while cursor.peek() not in ("}", ""):
        if cursor.key() == section:
            if cursor.peek() != "[":
                raise BrokenFileError(f"{section!r} is not a list")
            cursor.take()
            return
        if cursor.peek() == "[":
            cursor.take()
            for _ in _items(cursor, named=False):
                pass
        else:
            cursor.value()
        if cursor.peek() == ",":
            cursor.take()
    raise BrokenFileError(f"holds no list {section!r}")


def _items(cursor: "_Cursor", named: bool) -> Iterator[Element]:
    """Entries up to the closing bracket, which is taken."""
    closing = "}" if named else "]"
    while (mark := cursor.peek()) != closing:
        offset = cursor.offset
        if not mark:
            raise BrokenFileError(f"the file ends at byte {offset}, before its last bracket")
        name = cursor.key() if named else ""
        value, problem = cursor.value()
        mark = cursor.peek()
        yield Element(offset, name, value, problem)
        if mark == ",":
            cursor.take()
        elif mark == "{" and not named:
            continue  # the comma between two entries is missing, and neither of them is damaged
        elif mark not in (closing, ""):
            raise BrokenFileError(f"invalid JSON at byte {cursor.offset}: {mark!r} behind an entry")
    cursor.take()


class _Cursor:
    """A place in a file of JSON, and the window of text around it."""

    def __init__(self, file: IO[bytes], offset: int) -> None:
        file.seek(offset)
        self._file = file
        self._text = ""
        self._base = offset  # of the window's first character
        self._at = 0
        if offset == 0 and self._fill() and self._text.startswith(_BYTE_ORDER_MARK):
            self._at = len(_BYTE_ORDER_MARK)

    @property
    def offset(self) -> int:
        """Bytes from the file's beginning."""
        return self._base + self._at

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def take(self) -> None:
        """Move over the character that `peek` showed."""
        self._at += 1

    def key(self) -> str:
        """The key of an object's member; the cursor is then at the member's value."""
        offset = self.offset
        name, problem = self.value()
        if problem or not isinstance(name, str) or self.peek() != ":":
            raise BrokenFileError(f"invalid JSON at byte {offset}: {problem or 'a key is missing'}")
        self.take()
        self.peek()
        return name

    def value(self) -> tuple[Any, str]:
        """The value here, or None and what is wrong with it; the cursor is then behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._text) - _MARGIN
                )
                reason = f"invalid JSON: {error.msg} at byte {self._base + error.pos} of the file"
                if cut and len(self._text) - self._at > streams.MAX_LINE_BYTES:
                    reason = _too_long()
                elif cut and self._fill():
                    continue
            except RecursionError:
                reason = "invalid JSON: nested too deeply"
            except ValueError as error:  # a number of thousands of digits
                reason = f"invalid JSON: {error}"
            else:
                number = isinstance(value, int | float)
                if number and end >= len(self._text) - _MARGIN and self._fill():
                    continue  # it may go on: "1", "1." and "1e+" at the window's end
                return self._checked(value, end)
            self._skip(reason)
            return None, reason

    def _checked(self, value: Any, end: int) -> tuple[Any, str]:
        """What was parsed as latin-1, parsed again as UTF-8 where that makes a difference."""
        start, self._at = self._at, end
        if end - start > streams.MAX_LINE_BYTES:
            return None, _too_long()
        if self._text.isascii() or (part := self._text[start:end]).isascii():
            return value, ""
        try:
            return json.loads(part.encode("latin-1").decode("utf-8")), ""
        except UnicodeDecodeError as error:
            return None, f"invalid UTF-8 at byte {error.start} of the entry"

    def _fill(self) -> bool:
        """Read on, dropping what lies before the cursor; False at the end of the file."""
        data = self._file.read(max(_WINDOW, len(self._text) - self._at))
        if not data:
            return False
        self._text = self._text[self._at :] + data.decode("latin-1")
        self._base += self._at
        self._at = 0
        return True

    def _skip(self, reason: str) -> None:
        """Move behind a damaged value by quotes and brackets alone."""
        lost = f"the entry at byte {self.offset} has no end: {reason}"
        brackets: list[str] = []
        while mark := self._next_mark():
            if mark in "[{":
                brackets.append(mark)
            elif not brackets:  # the comma or bracket behind a value that has none itself
                self._at -= 1
                return
            elif mark in "]}":
                if brackets.pop() + mark not in ("[]", "{}"):
                    break
                if not brackets:
                    return
            if len(brackets) > _MAX_DEPTH:
                break
        raise BrokenFileError(lost)

    def _next_mark(self) -> str:
        """The next bracket or comma outside quotes, and move behind it; "" at the file's end."""
        quoted = False
        while True:
            found = (_IN_TEXT if quoted else _MARK).search(self._text, self._at)
            if found is None:
                self._at = len(self._text)
                if not self._fill():
                    return ""
                continue
            mark, self._at = found.group(), found.end()
            if mark == '"':
                quoted = not quoted
            elif mark != "\\":
                return mark
            else:  # what it escapes is passed over
                if self._at == len(self._text):
                    self._fill()
                self._at += 1


def _begins(opening: str) -> str:
    if opening in ("\xff", "\xfe"):
        return "the file is UTF-16, not UTF-8"
    return f"the file begins with {opening!r}" if opening else "the file is empty"


def _too_long() -> str:
    return f"entry is longer than {streams.MAX_LINE_BYTES} bytes"


def line_elements(file: IO[bytes], start: int = 0, stop: int = sys.maxsize) -> Iterator[Element]:
    """Lines that begin in bytes [start, stop), as text; `start` is where a line begins."""
    file.seek(start)
    lines = streams.bounded_lines(file)
    while (offset := file.tell()) < stop and (line := next(lines, b"")):
        if line.strip():
            yield _line(offset, line)


def _line(offset: int, line: bytes) -> Element:
    if len(line) > streams.MAX_LINE_BYTES:
        return Element(offset, "", None, f"line is longer than {streams.MAX_LINE_BYTES} bytes")
    try:
        return Element(offset, "", line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Element(offset, "", None, f"invalid UTF-8 at byte {error.start} of the line")


def entry(element: Element) -> dict[str, Any]:
    """The element's value as an object; ValueError says what it is instead."""
    if element.problem:
        raise ValueError(element.problem)
    if not isinstance(element.value, dict):
        raise ValueError(f"entry is {kind(element.value)}, not an object")
    return element.value
