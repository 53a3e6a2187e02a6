"""Entries of a second list, looked up by the id to which an entry of the first list refers.

VQAv2 keeps questions and answers in separate files, and COCO keeps captions and file names in
separate lists. Only an id, a number and a text of each joined entry are held in memory, some tens
of bytes each, once per process.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mdm.sources import jsonfile
from mdm.sources.fields import number_field
from mdm.sources.jsoncursor import BrokenFileError
from mdm.sources.packed import open_file
from mdm.sources.record import attempt
from mdm.sources.streams import ARCHIVE_ERRORS, describe


@dataclass(frozen=True)
class Join:
    """A join with the list `section` of `file`, whose entries have their ids in the field `key`.

    `value` extracts what is kept of an entry, a number and a text, and raises ValueError for a bad
    entry. If `required`, an entry to which nothing refers is an error.
    """

    file: str
    section: str
    key: str
    value: Callable[[dict[str, Any]], tuple[int, str]]
    required: bool = False


class Joined:
    """The joined entries by id. If two entries with one id differ, both are bad."""

    def __init__(self, root: Path, join: Join) -> None:
        """Read all entries; use `load_joined`, which reads a file only once."""
        self._join = join
        self._bad: dict[int, str] = {}  # id of a bad entry -> problem
        self._problems: list[tuple[int, str]] = []  # (byte, problem) of bad or repeated ids
        self._damage = ""
        entries: dict[int, tuple[int, str, int]] = {}  # by id: number, text and offset
        try:
            self._read(root, entries)
        except (BrokenFileError, *ARCHIVE_ERRORS) as error:
            self._damage = describe(error)
        ids = sorted(entries)
        self._ids = np.array(ids, np.int64)
        self._numbers = np.array([entries[i][0] for i in ids], np.int64)
        self._texts = [entries[i][1] for i in ids]
        self._offsets = np.array([entries[i][2] for i in ids], np.int64)

    def get(self, key: int, name: str) -> tuple[int, str]:
        """The entry's number and text; ValueError if it is missing or bad."""
        at = int(np.searchsorted(self._ids, key))
        if at < len(self._ids) and self._ids[at] == key:
            if key in self._bad:
                raise ValueError(f"{self._join.section} entry of {name} {key}: {self._bad[key]}")
            return int(self._numbers[at]), self._texts[at]
        damage = f" (unreadable: {self._damage})" if self._damage else ""
        raise ValueError(f"no entry in {self._join.section} for {name} {key}{damage}")

    def unclaimed(self, referenced: Iterator[str]) -> Iterator[tuple[int, str, str]]:
        """(byte, id, problem) of the problems that belong to no entry of the first list.

        `referenced` are the ids to which that list refers.
        """
        section = self._join.section
        for offset, problem in self._problems:
            yield offset, f"{section}@{offset}", f"{section} entry: {problem}"
        if self._damage:
            yield 0, f"{section}@", f"unreadable {section}: {self._damage}"
        if self._join.required:
            # An id published as text may have any number of digits.
            ids = {int(n) for n in referenced if n.removeprefix("-").isdecimal() and len(n) < 19}
            for at in np.flatnonzero(~np.isin(self._ids, np.fromiter(ids, np.int64))).tolist():
                key = int(self._ids[at])
                yield int(self._offsets[at]), str(key), f"{section} entry that nothing refers to"

    def _read(self, root: Path, entries: dict[int, tuple[int, str, int]]) -> None:
        join = self._join
        with open_file(root, join.file) as file:
            for element in jsonfile.elements(file, join.section):
                try:
                    entry = jsonfile.entry(element)
                    key = number_field(entry.get(join.key), join.key)
                except ValueError as error:
                    self._problems.append((element.offset, str(error)))
                    continue
                value = attempt(f"{join.file}@{element.offset}", join.value, entry)
                problem = str(value) if isinstance(value, ValueError) else ""
                number, text = (0, "") if isinstance(value, ValueError) else value
                if key in entries:
                    self._problems.append((element.offset, f"duplicate {join.key} {key}"))
                    if (*entries[key][:2], self._bad.get(key, "")) != (number, text, problem):
                        self._bad[key] = "two entries with this id that differ"
                    continue
                if problem:
                    self._bad[key] = problem
                # A few answers make up most texts.
                entries[key] = number, sys.intern(text), element.offset


def load_joined(root: Path, join: Join) -> Joined:
    """The joined entries, from memory unless the file has changed."""
    stamp = (0, 0)
    with suppress(OSError):  # its reader reports it
        status = (root / join.file.partition("::")[0]).stat()
        stamp = status.st_size, status.st_mtime_ns
    return _load(root, join, stamp)


@lru_cache(maxsize=2)
def _load(root: Path, join: Join, stamp: tuple[int, int]) -> Joined:
    del stamp  # it is part of the cache key, so that a changed file is read again
    return Joined(root, join)
