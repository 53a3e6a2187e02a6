"""Entries that wait on disk until somebody has taken them, across restarts."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

LARGEST = 256 << 20
TIDY = 1 << 20  # a journal of which all is taken starts anew beyond this size


class Journal:
    """A queue of JSON objects in `folder`: appended by one thread, taken in order by another.

    `append` hands the bytes to the system at once, so that they outlive a killed process. What was
    taken is noted after the fact: an entry is taken at least once.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._note = folder / "journal.jsonl", folder / "taken"
        self._lock = threading.Lock()
        self._file = self._path.open("a+b")
        self._end = self._whole()
        self._taken = min(
            int(self._note.read_text(encoding="utf-8")) if self._note.exists() else 0, self._end
        )
        self.backlog = self._end  # the position before which entries are of former processes

    def _whole(self) -> int:
        """The length up to the last whole line; what a kill cut short is dropped."""
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        os.truncate(self._path, end)
        return end

    def append(self, entry: dict[str, Any]) -> bool:
        """Add an entry; False if there is no room for it."""
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            if self._end - self._taken + len(line) > LARGEST:
                return False
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                return False
            self._end += len(line)
        return True

    def waiting(self, most: int = 500) -> list[tuple[dict[str, Any], int, bool]]:
        """The oldest entries not taken yet: each itself, where it ends, whether it is backlog."""
        with self._lock:
            start, end = self._taken, self._end
        found: list[tuple[dict[str, Any], int, bool]] = []
        with self._path.open("rb") as file:
            file.seek(start)
            while file.tell() < end and len(found) < most:
                begin, line = file.tell(), file.readline()
                found.append((json.loads(line), file.tell(), begin < self.backlog))
        return found

    def take(self, end: int) -> None:
        """Note that everything before `end` was taken."""
        with self._lock:
            self._taken = end
            if self._taken == self._end > TIDY:
                self._file.truncate(0)
                self._taken = self._end = self.backlog = 0
            # Unwritten, the entry is taken once more by the next process.
            with contextlib.suppress(OSError):
                temporary = self._note.with_suffix(".part")
                temporary.write_text(str(self._taken), encoding="utf-8")
                temporary.replace(self._note)

    def __len__(self) -> int:
        """Bytes that wait."""
        with self._lock:
            return self._end - self._taken

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()
