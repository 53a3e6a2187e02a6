"""A place in a large file of JSON: values are taken from there, and damage is passed over.

A window slides over the file and the standard parser takes one value after another from it, so
memory stays at one entry. The window holds latin-1 text: one character a byte, so that positions
are byte offsets. A damaged entry is passed over by its brackets and quotes or, where these are
damaged too, up to the next one that looks like those before it.
"""

import json
import re
from collections.abc import Iterable
from itertools import islice
from typing import IO, Any

from mdm.sources import streams
from mdm.sources.record import one_record

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
# An object, and the key that names it or "".
_OBJECT = re.compile(r"()(?=\{)")
_NAMED_OBJECT = re.compile(r'(?<!\\)"((?:[^"\\]|\\.)*+)"[ \t\n\r]*:[ \t\n\r]*(?=\{)', re.DOTALL)
_FIRST_KEY = re.compile(r'\{[ \t\n\r]*"([^"\\]*)"')
_MORE = re.compile(r'[ \t\n\r]*,?[ \t\n\r]*[{"]')
_BEHIND_MEMBER = re.compile(r'[ \t\n\r]*[,}"]')  # a missing comma alone damages no entry
_NEXT_MEMBER = re.compile(r',[ \t\n\r]*("|$)')
END_OF_FILE = "\x1a"  # that DOS puts behind the last line
_LONGEST_MATCH = 1 << 10  # of a section's name, or a bracket, with the white space around it
_BEFORE = re.compile("(?:[ \t\n\r]*\xef\xbb\xbf)*")  # byte order marks, in latin-1


class BrokenFileError(ValueError):
    """The file is damaged so that nothing behind that place can be told apart."""


class Cursor:
    """A place in a file of JSON, and the window of text around it."""

    def __init__(self, file: IO[bytes], offset: int) -> None:
        file.seek(offset)
        self._file = file
        self._text = ""
        self._base = offset  # of the window's first character
        self._at = 0
        if offset == 0 and self._fill():  # two programs may have put one in front each
            marks = _BEFORE.match(self._text)
            self._at = marks.end() if marks else 0

    @property
    def offset(self) -> int:
        """Bytes from the file's beginning."""
        return self._base + self._at

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            self._at = _behind_space(self._text, self._at)
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
        name, end, problem = self._parse(False)
        if problem:  # the object behind it is this member's, not the next entry
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
        """The value here, or None and what is wrong with it; the cursor is then behind it.

        Of an entry, `named` or in a list, `like` are the keys of the one before: so looks the next
        one, too.
        """
        entry_of_object = named and like is not None
        value, end, reason = self._parse(entry_of_object)
        if not reason and entry_of_object and not _BEHIND_MEMBER.match(self._text, end):
            # The closing brace was the whole object's: this entry has none, and holds the others.
            like = _keys_of_entry_within(value, like or ())
            reason = "invalid JSON: it holds the next entry" if like else ""
        if not reason:
            return self._checked(value, end)
        return None, self._pass_over(reason, self._base + end, named, like)

    def _parse(self, entry_of_object: bool) -> tuple[Any, int, str]:
        """The value, where it ends and ""; or None, where it is damaged (-1: unknown), and how."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._text) - _MARGIN
                )
                if cut and len(self._text) - self._at > streams.MAX_LINE_BYTES:
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
        """How far the window has to reach to tell that the value ends there, and what follows."""
        if isinstance(value, int | float):
            return end + _MARGIN  # it may go on: "1", "1." and "1e+" at the window's end
        if not entry_of_object:
            return end - 1
        return min(_behind_space(self._text, end), end + _REACH)

    def _pass_over(self, reason: str, at: int, named: bool, like: tuple[str, ...] | None) -> str:
        """Move behind the value here, which is damaged at byte `at`; the reason to tell.

        An entry that lacks its last brace is no damage to the parser until much further on.
        """
        stop = None if like is None else self._next_entry(named, like)
        if stop is not None and self._base + stop <= at:
            where = f"byte {self._base + stop} of the file"
            reason = f"invalid JSON: no end before the next entry at {where}"
        self._skip(reason, stop)
        if stop is not None and not _MORE.match(self._text, self._at):
            self._at = stop  # its brackets were wrong, too: no entry begins behind them
        return reason

    def _checked(self, value: Any, end: int) -> tuple[Any, str]:
        """What was parsed as latin-1, parsed again as UTF-8 where that makes a difference."""
        start, self._at = self._at, end
        if end - start > streams.MAX_LINE_BYTES:
            return None, _too_long()
        if self._text.isascii() or (part := self._text[start:end]).isascii():
            return value, ""
        try:
            with one_record(passing=(UnicodeDecodeError,)):
                return json.loads(part.encode("latin-1").decode("utf-8")), ""
        except UnicodeDecodeError as error:
            return None, f"invalid UTF-8 at byte {error.start} of the entry"
        except ValueError as error:  # nested so deeply that another call is one too many
            return None, f"invalid JSON: {error}"

    def _fill(self) -> bool:
        """Read on, dropping what lies before the cursor; False at the end of the file."""
        data = self._file.read(max(_WINDOW, len(self._text) - self._at))
        if not data:
            return False
        self._text = self._text[self._at :] + data.decode("latin-1")
        self._base += self._at
        self._at = 0
        return True

    def _look_ahead(self, size: int) -> None:
        """Have the window reach so many bytes, or to the file's end."""
        while len(self._text) - self._at < size and self._fill():
            pass

    def ends(self, within: bool) -> bool:
        """Whether what follows the bracket here may follow a list; else it closes nothing."""
        self._look_ahead(_LONGEST_MATCH)
        rest = self._text[self._at + 1 : self._at + _LONGEST_MATCH].lstrip(" \t\n\r")
        return not rest.strip(END_OF_FILE) or (
            within and (rest[0] == "}" or _NEXT_MEMBER.match(rest) is not None)
        )

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
        self._look_ahead(_REACH)
        found: list[tuple[int, tuple[str, ...], int]] = []
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
                if like and _first_key(self._text, match.end()) == like[0]:
                    return match.start()
                continue
            at = end
            if like and alike(value, like):
                return match.start()
            found.append((end - match.end(), tuple(value), match.start()))
        keys = max(found)[1] if found and not like else ()
        return next((start for _, other, start in found if keys and alike(other, keys)), None)

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


def _behind_space(text: str, at: int) -> int:
    """The first place from there that holds no white space; at the end of the text, its length."""
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _first_key(text: str, brace: int) -> str:
    """The first key of the object that begins there."""
    found = _FIRST_KEY.match(text, brace)
    return found.group(1) if found else ""


def alike(keys: Iterable[str], others: tuple[str, ...]) -> bool:
    """Whether two entries have most of their keys in common."""
    one, other = set(keys), set(others)
    return 2 * len(one & other) > len(one | other)


def _keys_of_entry_within(value: Any, like: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of an entry that is a member of this one, which lacks its last brace; or ().

    `like` are those of an entry before. Where there is none, the fields in front of the member say
    what an entry looks like.
    """
    fields: list[str] = []
    for name, member in islice(value.items() if isinstance(value, dict) else (), _CANDIDATES):
        keys = like or tuple(fields)
        if name not in keys and isinstance(member, dict) and alike(member, keys):
            return keys
        fields.append(name)
    return ()


def _too_long() -> str:
    return f"entry is longer than {streams.MAX_LINE_BYTES} bytes"
