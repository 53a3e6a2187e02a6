"""Entries that wait on disk until somebody has taken them, across restarts."""

import contextlib
import os
import re
import threading
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Any

from mdm.utils import files

LARGEST = 256 << 20
TIDY = 1 << 20  # a journal of which all is taken starts anew beyond this size


class Journal:
    """A queue of JSON objects in `folder`: appended by one thread, taken in order by another.

    `append` hands the bytes to the system at once, so that they outlive a killed process. What was
    taken is noted after the fact: an entry is taken at least once. Damaged lines are passed over,
    and so are objects of which `misfit` says what is wrong.
    """

    def __init__(
        self, folder: Path, misfit: Callable[[dict[str, Any]], str] = lambda entry: ""
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._note = folder / "journal.jsonl", folder / "taken"
        self._misfit = misfit
        self._lock = threading.Lock()
        files.set_folder_aside(self._path)
        self._file = self._path.open("a+b", buffering=0)
        self._end = self._file.seek(0, 2)
        # After half a line the next entry needs one of its own.
        self._gap = b"" if _ends_a_line(self._file.fileno(), self._end) else b"\n"
        self._taken = self._read_note()
        self._told = self._taken  # damage before it was told of
        self.backlog = self._end  # the position before which entries are of former processes

    def _read_note(self) -> int:
        """How much was taken; nothing if that cannot be known, so that no entry is missed."""
        try:
            text = self._note.read_bytes()
        except FileNotFoundError:
            return 0
        except OSError as error:
            wrong = error.strerror or str(error)
        else:
            wrong = "is not a number"
            if re.fullmatch(rb"\d{1,18}\s*", text):
                taken = int(text)
                if taken <= self._end and _ends_a_line(self._file.fileno(), taken):
                    return taken
                wrong = f"{taken} is no end of a line of {self._path.name}"
        files.warn_once(f"{self._note}: {wrong}; all entries of the journal are brought again")
        return 0

    def append(self, entry: dict[str, Any]) -> bool:
        """Add an entry; False if there is no room for it."""
        with self._lock:
            line = self._gap + dumps(entry).encode() + b"\n"
            if self._file.closed or self._end - self._taken + len(line) > LARGEST:
                return False
            try:
                if self._file.write(line) != len(line):
                    self._file.truncate(self._end)
                    return False
            except OSError:
                return False
            self._gap = b""
            self._end += len(line)
        return True

    def waiting(self, most: int = 500) -> list[tuple[dict[str, Any], int, bool]]:
        """The oldest entries not taken yet: each itself, where it ends, whether it is backlog."""
        with self._lock:
            start, end = self._taken, self._end
        found: list[tuple[dict[str, Any], int, bool]] = []
        damage: list[tuple[int, str]] = []
        # By its handle: somebody may have removed the folder.
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file:
            file.seek(start)
            while (begin := file.tell()) < end and len(found) < most:
                line = file.readline()
                entry, wrong = files.parse_line(line, {"kind": str})
                if entry is not None and (unfit := self._misfit(entry)):
                    entry, wrong = None, unfit
                if entry is not None:
                    found.append((entry, file.tell(), begin < self.backlog))
                if wrong and begin >= self._told:
                    damage.append((begin, wrong))
            self._told = max(self._told, file.tell())
            after = file.tell()
        files.warn_of_lines(self._path, damage, "at byte")
        if not found and after > start:
            self.take(after)
        return found

    def take(self, end: int) -> None:
        """Note that everything before `end` was taken."""
        with self._lock:
            self._taken = end
            # Unwritten, the entry is taken once more by the next process.
            with contextlib.suppress(OSError):
                if self._taken == self._end > TIDY:
                    self._write_note(0)  # first: a note beyond the end would be no use
                    self._file.truncate(0)
                    self._taken = self._end = self.backlog = self._told = 0
                else:
                    self._write_note(end)

    def _write_note(self, taken: int) -> None:
        files.set_folder_aside(self._note)
        temporary = self._note.with_suffix(".part")
        temporary.write_text(str(taken), encoding="utf-8")
        temporary.replace(self._note)

    def rewind(self) -> None:
        """Have everything that is still there taken again."""
        self.take(0)

    def withdraw(self) -> None:
        """Drop what this process has appended; nothing is left of a journal that began with it."""
        with self._lock, contextlib.suppress(OSError):
            self._file.truncate(self.backlog)
            self._end = self.backlog
            self._taken = min(self._taken, self._end)
            self._file.close()
            if not self.backlog:
                self._path.unlink()
                self._note.unlink(missing_ok=True)
                self._path.parent.rmdir()

    def __len__(self) -> int:
        """Bytes that wait."""
        with self._lock:
            return self._end - self._taken

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def _ends_a_line(handle: int, end: int) -> bool:
    """Whether what is appended at `end` begins a line: it does not after half a line."""
    return end == 0 or os.pread(handle, 1, end - 1) == b"\n"
