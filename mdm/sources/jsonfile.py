"""Large JSON files read entry by entry: a list, an object of entries, or a list within an object.

Published annotations are a single JSON value of up to gigabytes. Reading can start at the offset of
any entry, and damage loses only the damaged entry: all entries after it are still read.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from mdm.sources.fields import kind
from mdm.sources.jsoncursor import END_OF_FILE, BrokenFileError, Cursor, alike
from mdm.sources.textfile import decode_line, is_blank, lines_with_offsets


@dataclass(frozen=True)
class Element:
    """One entry: the byte where it starts, its key or "", its value or the `problem` with it."""

    offset: int
    name: str
    value: Any
    problem: str = ""


def elements(
    file: IO[bytes], section: str = "", start: int = 0, stop: int = sys.maxsize
) -> Iterator[Element]:
    """Entries that start in bytes [start, stop) of the file's list or object, in its order.

    With `section`, the entries are those of the list under this key of the file's object. `start`
    is 0 or the offset of an entry. Raises BrokenFileError if the rest of the file cannot be read.
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
        raise BrokenFileError(f"no JSON list or object: {_first_character(opening)}")
    if start:
        cursor = Cursor(file, start)
    named = opening == "{"
    for element in _items(cursor, named, bool(section)):
        if element.offset >= stop:
            return
        yield element
    mark = cursor.peek()
    if mark not in (("", END_OF_FILE, ",", "}") if section else ("", END_OF_FILE)):
        raise BrokenFileError(
            f"invalid JSON at byte {cursor.offset}: {mark!r} after the last entry"
        )


def _enter(cursor: Cursor, section: str) -> None:
    """Move past the bracket that opens the section."""
    if (opening := cursor.peek()) != "{":
        raise BrokenFileError(
            f"no JSON object with a list {section!r}: {_first_character(opening)}"
        )
    cursor.take()
    try:
        while cursor.peek() not in ("}", ""):
            name = cursor.key()
            if cursor.peek() == "[":
                cursor.take()
                if name == section:
                    return
                for _ in _items(cursor, named=False, within=True):
                    pass
            elif name == section:
                raise BrokenFileError(f"{section!r} is not a list")
            else:
                cursor.value()
            if cursor.peek() == ",":
                cursor.take()
    except BrokenFileError:
        # Damaged brackets of another list must not lose this one.
        if not cursor.find(re.compile(rf'"{re.escape(section)}"[ \t\n\r]*:[ \t\n\r]*\[')):
            raise
        return
    raise BrokenFileError(f"holds no list {section!r}")


def _items(cursor: Cursor, named: bool, within: bool) -> Iterator[Element]:
    """Entries up to and including the closing bracket; `within` means inside another object."""
    closing, opening = ("}", '"') if named else ("]", "{")
    like: tuple[str, ...] = ()  # the keys of the last complete entry
    doubtful = False  # after damage a bracket may belong to the damaged entry
    while True:
        mark, offset = cursor.peek(), cursor.offset
        if not mark:
            raise BrokenFileError(f"the file ends at byte {offset}, before its last bracket")
        if mark == closing and cursor.ends(named, within, like if doubtful else ()):
            cursor.take()
            return
        name, value, problem = _entry(cursor, named, like, closing)
        doubtful = doubtful or bool(problem)
        previous = like
        if isinstance(value, dict) and (not like or alike(value, like)):
            like, doubtful = tuple(value), False
        yield Element(offset, name, value, problem)
        if (mark := cursor.peek()) == ",":
            cursor.take()
        elif mark not in (opening, closing, ""):  # a missing comma by itself damages no entry
            offset = cursor.offset
            problem = f"invalid JSON at byte {offset}: {mark!r} after an entry"
            like, doubtful = previous, True  # the entry just read may be only half of one
            if not cursor.to_entry(named, like):
                raise BrokenFileError(problem)
            yield Element(offset, "", None, problem)


def _entry(
    cursor: Cursor, named: bool, like: tuple[str, ...], closing: str
) -> tuple[str, Any, str]:
    """Name, value and problem of the entry here; moves past it, or to the next entry."""
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


def _first_character(opening: str) -> str:
    return f"the file begins with {opening!r}" if opening else "the file is empty"


def line_elements(file: IO[bytes], start: int = 0, stop: int = sys.maxsize) -> Iterator[Element]:
    """Lines that start in bytes [start, stop), as text; `start` is the start of a line."""
    file.seek(start)
    for offset, line in lines_with_offsets(file):
        if offset >= stop:
            return
        if is_blank(line):
            continue
        try:
            yield Element(offset, "", decode_line(line))
        except ValueError as error:
            yield Element(offset, "", None, str(error))


def entry(element: Element) -> dict[str, Any]:
    """The element's value as an object; ValueError if it is damaged or of another kind."""
    if element.problem:
        raise ValueError(element.problem)
    if not isinstance(element.value, dict):
        raise ValueError(f"entry is {kind(element.value)}, not an object")
    return element.value
