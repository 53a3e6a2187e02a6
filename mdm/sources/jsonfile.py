"""Large JSON files read entry by entry: a list, an object of entries, or a list within an object.

Published annotations are one JSON value of up to gigabytes. Reading can begin at any entry found
before, and damage costs the damaged entry alone: all behind it still come.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from mdm.sources import streams
from mdm.sources.fields import kind
from mdm.sources.jsoncursor import END_OF_FILE, BrokenFileError, Cursor, alike
from mdm.sources.textfile import decode_line, is_blank


@dataclass(frozen=True)
class Element:
    """One entry: the byte where it begins, its key or "", its value or the `problem` with it."""

    offset: int
    name: str
    value: Any
    problem: str = ""


def elements(
    file: IO[bytes], section: str = "", start: int = 0, stop: int = sys.maxsize
) -> Iterator[Element]:
    """Entries that begin in bytes [start, stop) of the file's list or object, in its order.

    `section` names the list within an object that is meant instead. `start` is 0 or the offset of
    an entry. Raises BrokenFileError where the rest of the file is out of reach.
    """
    cursor = Cursor(file, 0)
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
        cursor = Cursor(file, start)
    named = opening == "{"
    for element in _items(cursor, named, bool(section)):
        if element.offset >= stop:
            return
        yield element
    rest = cursor.peek()
    if rest not in (("", END_OF_FILE, ",", "}") if section else ("", END_OF_FILE)):
        raise BrokenFileError(
            f"invalid JSON at byte {cursor.offset}: {rest!r} behind the last entry"
        )


def _enter(cursor: Cursor, section: str) -> None:
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


def _items(cursor: Cursor, named: bool, within: bool) -> Iterator[Element]:
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
        if isinstance(value, dict) and (not like or alike(value, like)):
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
    cursor: Cursor, named: bool, like: tuple[str, ...], closing: str
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


def _ends(cursor: Cursor, named: bool, within: bool, like: tuple[str, ...]) -> bool:
    """Whether the bracket here closes the list, and no further entry `like` those before comes."""
    return cursor.ends(within) and not (like and cursor.has_entry(named, like))


def _begins(opening: str) -> str:
    return f"the file begins with {opening!r}" if opening else "the file is empty"


def line_elements(file: IO[bytes], start: int = 0, stop: int = sys.maxsize) -> Iterator[Element]:
    """Lines that begin in bytes [start, stop), as text; `start` is where a line begins."""
    file.seek(start)
    for offset, line in streams.lines_at(file):
        if offset >= stop:
            return
        if not is_blank(line):
            yield _line(offset, line)


def _line(offset: int, line: bytes) -> Element:
    if len(line) > streams.MAX_LINE_BYTES:
        return Element(offset, "", None, f"line is longer than {streams.MAX_LINE_BYTES} bytes")
    try:
        return Element(offset, "", decode_line(line))
    except ValueError as error:
        return Element(offset, "", None, str(error))


def entry(element: Element) -> dict[str, Any]:
    """The element's value as an object; ValueError says what it is instead."""
    if element.problem:
        raise ValueError(element.problem)
    if not isinstance(element.value, dict):
        raise ValueError(f"entry is {kind(element.value)}, not an object")
    return element.value
