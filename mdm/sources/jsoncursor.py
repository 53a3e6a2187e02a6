"""A position in a large JSON file, from which values are read and damage is skipped.

A window of text slides over the file, and the standard parser reads one value after another from
it, so only one entry is held in memory. The text is decoded as latin-1, one character per byte, so
that positions are byte offsets. A damaged entry is skipped by matching its brackets and quotes or,
if these are damaged too, by searching for the next entry that resembles the previous ones.
"""

import json
import re
from collections.abc import Iterable
from itertools import islice
from typing import IO, Any

from mdm.sources import textfile
from mdm.sources.record import one_record

_WINDOW = 1 << 18
# An error this close to the window's end may only mean that the entry continues beyond it.
_MARGIN = 16
_MAX_DEPTH = 10_000
# How far after damage the next entry is searched for, in bytes and in objects.
_REACH = 1 << 20
_CANDIDATES = 4096
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_MARK = re.compile(r'["\[\]{},]')
_IN_STRING = re.compile(r'["\\]')
# An object, preceded by its key, if it has one, as the first group.
_OBJECT = re.compile(r"()(?=\{)")
_NAMED_OBJECT = re.compile(r'(?<!\\)"((?:[^"\\]|\\.)*+)"[ \t\n\r]*:[ \t\n\r]*(?=\{)', re.DOTALL)
_FIRST_KEY = re.compile(r'\{[ \t\n\r]*"([^"\\]*)"')
_MORE = re.compile(r'[ \t\n\r]*,?[ \t\n\r]*[{"]')
_AFTER_MEMBER = re.compile(r'[ \t\n\r]*[,}"]')  # a missing comma by itself damages no entry
_AFTER_LIST = re.compile(r'\}|,[ \t\n\r]*("|$)')
END_OF_FILE = "\x1a"  # DOS writes it after the last line
_LONGEST_MATCH = 1 << 10  # a section's name or a bracket, with the white space around it
_BYTE_ORDER_MARKS = re.compile("(?:[ \t\n\r]*\xef\xbb\xbf)*")  # in latin-1


class BrokenFileError(ValueError):
    """The file is damaged so badly that nothing after that position can be read."""


class Cursor:
    """A position in a JSON file, and the window of text around it."""

    def __init__(self, file: IO[bytes], offset: int) -> None:
        file.seek(offset)
        self._file, self._text, self._at = file, "", 0
        self._base = offset  # the file offset of the window's first character
        if offset == 0 and self._fill():  # each of two programs may add a mark
            self._at = _end_of_match(_BYTE_ORDER_MARKS, self._text, 0)

    @property
    def offset(self) -> int:
        """Bytes from the start of the file."""
        return self._base + self._at

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            self._at = _end_of_match(_SPACE, self._text, self._at)
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def take(self) -> None:
        """Move past the character that `peek` returned."""
        self._at += 1

    def key(self) -> str:
        """The key of an object's member; moves to the member's value."""
        offset = self.offset
        name, end, problem = self._parse(False)
        if problem:  # the object after it is this member's value, not the next entry
            self._look_ahead(_LONGEST_MATCH)
            self._at = max(self._at, self._text.find("{", self._at))
        else:
            name, problem = self._checked(name, end)
        if problem or not isinstance(name, str) or self.peek() != ":":
            raise BrokenFileError(f"invalid JSON at byte {offset}: {problem or 'a key is missing'}")
        self.take()
        self.peek()
        return name

    def value(self, named: bool = False, like: tuple[str, ...] | None = None) -> tuple[Any, str]:
        """The value here and "", or None and what is wrong with it; moves past the value.

        If the value is an entry (`named` in an object, otherwise in a list), `like` are the keys of
        the previous entry, which the next one is expected to share.
        """
        entry_of_object = named and like is not None
        value, end, reason = self._parse(entry_of_object)
        if not reason and entry_of_object and not _AFTER_MEMBER.match(self._text, end):
            # The closing brace belongs to the outer object: this entry lacks its own, so it
            # contains the entries after it.
            like = _keys_of_entry_within(value, like or ())
            reason = "invalid JSON: it contains the next entry" if like else ""
        if not reason:
            return self._checked(value, end)
        damaged_at = self._base + end
        stop = None if like is None else self._next_entry(named, like)
        if stop is not None and self._base + stop <= damaged_at:  # the parser failed much later
            where = f"byte {self._base + stop} of the file"
            reason = f"invalid JSON: no end before the next entry at {where}"
        self._skip(reason, stop)
        if stop is not None and not _MORE.match(self._text, self._at):
            self._at = stop  # its brackets were damaged, too: no entry starts after them
        return None, reason

    def _parse(self, entry_of_object: bool) -> tuple[Any, int, str]:
        """The value, its end and ""; or None, where damage is (-1: unknown), and the reason."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._text) - _MARGIN
                )
                if cut and len(self._text) - self._at > textfile.MAX_LINE_BYTES:
                    return None, len(self._text), _too_long()
                where = f"byte {self._base + error.pos} of the file"
                if not cut or not self._fill():
                    return None, error.pos, f"invalid JSON: {error.msg} at {where}"
            except RecursionError:
                return None, -1, "invalid JSON: nested too deeply"
            except ValueError as error:  # a number of thousands of digits
                return None, -1, f"invalid JSON: {error}"
            else:
                if self._needed(value, end, entry_of_object) < len(self._text) or not self._fill():
                    return value, end, ""

    def _needed(self, value: Any, end: int, entry_of_object: bool) -> int:
        """How far the window must reach to be sure of the value's end and of what follows."""
        if isinstance(value, int | float):
            return end + _MARGIN  # it may continue: "1", "1." and "1e+" at the window's end
        if not entry_of_object:
            return end - 1
        return min(_end_of_match(_SPACE, self._text, end), end + _REACH)

    def _checked(self, value: Any, end: int) -> tuple[Any, str]:
        """The value parsed as latin-1, parsed again as UTF-8 if that makes a difference."""
        start, self._at = self._at, end
        if end - start > textfile.MAX_LINE_BYTES:
            return None, _too_long()
        if self._text.isascii() or (part := self._text[start:end]).isascii():
            return value, ""
        try:
            with one_record(passing=(UnicodeDecodeError,)):
                return json.loads(part.encode("latin-1").decode("utf-8")), ""
        except UnicodeDecodeError as error:
            return None, f"invalid UTF-8 at byte {error.start} of the entry"
        except ValueError as error:  # nested so deeply that one more call exceeds the limit
            return None, f"invalid JSON: {error}"

    def _fill(self) -> bool:
        """Read on and drop the text before the cursor; False at the end of the file."""
        data = self._file.read(max(_WINDOW, len(self._text) - self._at))
        if not data:
            return False
        self._text = self._text[self._at :] + data.decode("latin-1")
        self._base += self._at
        self._at = 0
        return True

    def _look_ahead(self, size: int) -> None:
        """Extend the window to this many bytes, or to the end of the file."""
        while len(self._text) - self._at < size and self._fill():
            pass

    def ends(self, named: bool, within: bool, like: tuple[str, ...]) -> bool:
        """Whether the bracket here closes the list.

        The text after it must be able to follow a list, and no entry `like` the previous ones may.
        """
        self._look_ahead(_LONGEST_MATCH)
        after = self._text[self._at + 1 : self._at + _LONGEST_MATCH].lstrip(" \t\n\r")
        if after.strip(END_OF_FILE) and not (within and _AFTER_LIST.match(after)):
            return False
        return not (like and self._next_entry(named, like) is not None)

    def to_entry(self, named: bool, like: tuple[str, ...]) -> bool:
        """Move to the next entry with mostly these keys; False, without moving, if none follows."""
        start = self._next_entry(named, like)
        if start is not None:
            self._at = start
        return start is not None

    def find(self, pattern: re.Pattern[str]) -> bool:
        """Move past the first match in the whole file; False if there is none."""
        self._file.seek(0)
        self._text, self._base, self._at = "", 0, 0
        while self._fill():
            if match := pattern.search(self._text):
                self._at = match.end()
                return True
            self._at = max(0, len(self._text) - _LONGEST_MATCH)
        return False

    def _next_entry(self, named: bool, like: tuple[str, ...]) -> int | None:
        """The position in the window of the next object that has most keys of `like`.

        A damaged object whose first key is that of `like` counts, too. Without `like`, the largest
        of the next objects is taken as a model of an entry: smaller ones lie within entries.
        """
        self._look_ahead(_REACH)
        objects: list[tuple[int, tuple[str, ...], int]] = []  # (length, keys, start)
        at = self._at + 1
        pattern = _NAMED_OBJECT if named else _OBJECT
        for _ in range(_CANDIDATES):
            if (match := pattern.search(self._text, at)) is None:
                break
            at = match.end() + 1
            if match.group(1) in like:
                continue  # a field of an entry
            try:
                value, end = _DECODER.raw_decode(self._text, match.end())
            except (ValueError, RecursionError):
                first_key = _FIRST_KEY.match(self._text, match.end())
                if like and first_key and first_key[1] == like[0]:
                    return match.start()
                continue
            at = end
            if like and alike(value, like):
                return match.start()
            objects.append((end - match.end(), tuple(value), match.start()))
        keys = max(objects)[1] if objects and not like else ()
        return next((start for _, other, start in objects if keys and alike(other, keys)), None)

    def _skip(self, reason: str, stop: int | None) -> None:
        """Move past a damaged value by matching quotes and brackets; at most to `stop`."""
        problem = f"the entry at byte {self.offset} has no end: {reason}"
        brackets: list[str] = []
        while mark := self._next_mark(stop):
            if mark in "[{":
                brackets.append(mark)
            elif not brackets:  # the comma or bracket after a value without brackets
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
            raise BrokenFileError(problem)

    def _next_mark(self, stop: int | None) -> str:
        """The next bracket or comma outside quotes; moves past it.

        "" at the end of the file, or at `stop`, a position in the window.
        """
        quoted = False
        while True:
            end = len(self._text) if stop is None else stop
            match = (_IN_STRING if quoted else _MARK).search(self._text, self._at, end)
            if match is None:
                self._at = end
                if stop is not None or not self._fill():
                    return ""
                continue
            mark, self._at = match.group(), match.end()
            if mark == '"':
                quoted = not quoted
            elif mark != "\\":
                return mark
            else:  # skip the escaped character
                if self._at == len(self._text):
                    self._fill()
                self._at += 1


def _end_of_match(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The end of what the pattern matches from `at` on."""
    match = pattern.match(text, at)
    return match.end() if match else at


def alike(keys: Iterable[str], others: tuple[str, ...]) -> bool:
    """Whether two entries share most of their keys."""
    one, other = set(keys), set(others)
    return 2 * len(one & other) > len(one | other)


def _keys_of_entry_within(value: Any, like: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of an entry that is a member of this one, which lacks its closing brace; or ().

    `like` are the keys of a previous entry. If there is none, the fields before the member are
    taken as the keys of an entry.
    """
    fields: list[str] = []
    for name, member in islice(value.items() if isinstance(value, dict) else (), _CANDIDATES):
        keys = like or tuple(fields)
        if name not in keys and isinstance(member, dict) and alike(member, keys):
            return keys
        fields.append(name)
    return ()


def _too_long() -> str:
    return f"entry is longer than {textfile.MAX_LINE_BYTES} bytes"
