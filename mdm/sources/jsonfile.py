"""Large JSON files read entry by entry: a list, an object of entries, or a list within an object.

Published annotations are one JSON value of up to gigabytes. Here a window slides over the file and
the standard parser takes one entry after another from it, so memory stays at one entry. The window
holds latin-1 text: one character a byte, so that positions are byte offsets and reading can begin
at any entry found before. A damaged entry is passed over by its brackets and quotes or, where these
are damaged too, up to the next one that looks like those before it: all behind it still come.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from mdm.sources import streams
from mdm.sources.fields import kind

_WINDOW = 1 << 18
# An error so near the window's end may only mean that the entry goes on behind it.
_MARGIN = 16
_MAX_DEPTH = 10_000
# How far behind damage the next entry is looked for, in bytes and in objects.
_REACH = 1 << 20
_CANDIDATES = 4096
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_MARK = re.compile(r'["\[\]{},]')
_IN_TEXT = re.compile(r'["\\]')
_OBJECT = re.compile(r"(?=\{)")
_NAMED_OBJECT = re.compile(r'"[^"\\]*"[ \t\n\r]*:[ \t\n\r]*(?=\{)')
_FIRST_KEY = re.compile(r'\{[ \t\n\r]*"([^"\\]*)"')
_MORE = re.compile(r'[ \t\n\r]*,?[ \t\n\r]*[{"]')
_NEXT_MEMBER = re.compile(r',[ \t\n\r]*("|$)')
_LONGEST_MATCH = 1 << 10  # of a section's name, or a bracket, with the white space around it
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
    for element in _items(cursor, named, bool(section)):
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
    try:
        while cursor.peek() not in ("}", ""):
            if cursor.key() == section:
                if cursor.peek() != "[":
                    raise BrokenFileError(f"{section!r} is not a list")
                cursor.take()
                return
            if cursor.peek() == "[":
                cursor.take()
                for _ in _items(cursor, named=False, within=True):
                    pass
            else:
                cursor.value()
            if cursor.peek() == ",":
                cursor.take()
    except BrokenFileError:
        # The brackets of another list are no reason to lose this one.
        if not cursor.find(re.compile(rf'"{re.escape(section)}"[ \t\n\r]*:[ \t\n\r]*\[')):
            raise
        return
    raise BrokenFileError(f"holds no list {section!r}")


def _items(cursor: "_Cursor", named: bool, within: bool) -> Iterator[Element]:
    """Entries up to the closing bracket, which is taken; `within` another object, or alone."""
    closing, opening = ("}", '"') if named else ("]", "{")
    like: tuple[str, ...] = ()  # the keys of the last whole entry
    doubtful = False  # behind damage a bracket may be one of the entry's own
    while True:
        mark, offset = cursor.peek(), cursor.offset
        if not mark:
            raise BrokenFileError(f"the file ends at byte {offset}, before its last bracket")
        if mark == closing and _ends(cursor, named, within, like if doubtful else ()):
            cursor.take()
            return
        name, value, problem = _entry(cursor, named, like, closing)
        doubtful = doubtful or bool(problem)
        before = like
        if isinstance(value, dict) and (not like or _alike(value, like)):
            like, doubtful = tuple(value), False
        yield Element(offset, name, value, problem)
        if (mark := cursor.peek()) == ",":
            cursor.take()
        elif mark not in (opening, closing, ""):  # a missing comma alone damages no entry
            offset = cursor.offset
            problem = f"invalid JSON at byte {offset}: {mark!r} behind an entry"
            like, doubtful = before, True  # this one may be but the half of an entry
            if not cursor.to_entry(named, like):
                raise BrokenFileError(problem)
            yield Element(offset, "", None, problem)


def _entry(
    cursor: "_Cursor", named: bool, like: tuple[str, ...], closing: str
) -> tuple[str, Any, str]:
    """Name, value and problem of the entry here; the cursor is then behind it, or at the next."""
    name = ""
    try:
        if cursor.peek() == closing:
            raise BrokenFileError(
                f"invalid JSON at byte {cursor.offset}: {closing!r} between entries"
            )
        name = cursor.key() if named else ""
        return name, *cursor.value(named, like)
    except BrokenFileError as error:
        if not cursor.to_entry(named, like):
            raise
        return name, None, str(error)


def _ends(cursor: "_Cursor", named: bool, within: bool, like: tuple[str, ...]) -> bool:
    """Whether the bracket here closes the list, and no further entry `like` those before comes."""
    return cursor.ends(within) and not (like and cursor.has_entry(named, like))


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

    def value(self, named: bool = False, like: tuple[str, ...] | None = None) -> tuple[Any, str]:
        """The value here, or None and what is wrong with it; the cursor is then behind it.

        Of an entry in a list, `like` are the keys of the one before: so looks the next one, too.
        """
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
            stop = None if like is None else self._next_entry(named, like)
            self._skip(reason, stop)
            if stop is not None and not _MORE.match(self._text, self._at):
                self._at = stop  # its brackets were wrong, too: no entry begins behind them
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

    def ends(self, within: bool) -> bool:
        """Whether what follows the bracket here may follow a list; else it closes nothing."""
        while len(self._text) - self._at < _LONGEST_MATCH and self._fill():
            pass
        rest = self._text[self._at + 1 : self._at + _LONGEST_MATCH].lstrip(" \t\n\r")
        return not rest or (within and (rest[0] == "}" or _NEXT_MEMBER.match(rest) is not None))

    def has_entry(self, named: bool, like: tuple[str, ...]) -> bool:
        """Whether another entry follows that looks like that."""
        return self._next_entry(named, like) is not None

    def to_entry(self, named: bool, like: tuple[str, ...]) -> bool:
        """Move to the next entry that looks as one; False, without moving, if there is none."""
        found = self._next_entry(named, like)
        if found is not None:
            self._at = found
        return found is not None

    def find(self, pattern: re.Pattern[str]) -> bool:
        """Move behind the first match in the whole file; False if there is none."""
        self._file.seek(0)
        self._text, self._base, self._at = "", 0, 0
        while self._fill():
            if found := pattern.search(self._text):
                self._at = found.end()
                return True
            self._at = max(0, len(self._text) - _LONGEST_MATCH)
        return False

    def _next_entry(self, named: bool, like: tuple[str, ...]) -> int | None:
        """Where in the window the next object stands that has most keys of `like`, or its first.

        The latter is an entry that is damaged, too. Without `like`, the largest object of the
        next ones is what an entry looks like: others stand within entries.
        """
        while len(self._text) - self._at < _REACH and self._fill():
            pass
        found: list[tuple[int, tuple[str, ...], int]] = []
        at = self._at + 1
        pattern = _NAMED_OBJECT if named else _OBJECT
        for _ in range(_CANDIDATES):
            if (match := pattern.search(self._text, at)) is None:
                break
            at = match.end() + 1
            try:
                value, end = _DECODER.raw_decode(self._text, match.end())
            except (ValueError, RecursionError):
                if like and _first_key(self._text, match.end()) == like[0]:
                    return match.start()
                continue
            at = end
            if like and _alike(value, like):
                return match.start()
            found.append((end - match.end(), tuple(value), match.start()))
        keys = max(found)[1] if found and not like else ()
        return next((start for _, other, start in found if keys and _alike(other, keys)), None)

    def _skip(self, reason: str, stop: int | None) -> None:
        """Move behind a damaged value by quotes and brackets alone; at most to `stop`."""
        lost = f"the entry at byte {self.offset} has no end: {reason}"
        brackets: list[str] = []
        while mark := self._next_mark(stop):
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
        if stop is not None:
            self._at = stop
        elif mark == "]" and "[" not in brackets:  # the list ends, and with it its last entry
            self._at -= 1
        else:
            raise BrokenFileError(lost)

    def _next_mark(self, stop: int | None) -> str:
        """The next bracket or comma outside quotes, and move behind it.

        "" at the file's end, or at `stop`, a place in the window.
        """
        quoted = False
        while True:
            end = len(self._text) if stop is None else stop
            found = (_IN_TEXT if quoted else _MARK).search(self._text, self._at, end)
            if found is None:
                self._at = end
                if stop is not None or not self._fill():
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


def _first_key(text: str, brace: int) -> str:
    """The first key of the object that begins there."""
    found = _FIRST_KEY.match(text, brace)
    return found.group(1) if found else ""


def _alike(keys: Iterable[str], others: tuple[str, ...]) -> bool:
    """Whether two entries have most of their keys in common."""
    one, other = set(keys), set(others)
    return 2 * len(one & other) > len(one | other)


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
