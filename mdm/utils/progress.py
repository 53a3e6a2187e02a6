"""How much of a run's `metrics.jsonl` and `events.jsonl` MLflow has received: `tracking.json`."""

import json
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mdm.utils import files

METRICS, EVENTS, TRACKING = "metrics.jsonl", "events.jsonl", "tracking.json"
_OLD_JOURNAL = "tracking"  # a folder in runs that an earlier version began
_PROGRESS: files.Shape = {"run_id": str, "config": str}
_POSITIONS: files.Shape = {"key": str, "status": str, "former": list}


class Position(NamedTuple):
    """Where a line ends, in bytes, and the line's length and CRC-32: none at a file's start."""

    end: int = 0
    length: int = 0
    crc: int = 0


START = Position()


@dataclass
class Progress:
    """What `tracking.json` holds: the MLflow run of a folder, and what it has received."""

    run_id: str = ""
    config: str = ""  # fingerprint of the run's configuration
    key: str = ""
    status: str = ""  # the run's final status in MLflow; empty while it is RUNNING
    metrics: Position = START
    events: Position = START
    former: list[list[str]] = field(default_factory=list)  # id and key of runs to close as KILLED

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """What is known in `folder`; a damaged file is skipped with a warning."""
        path = folder / TRACKING
        note = files.read_json(path, _PROGRESS)
        progress = cls(note.get("run_id", ""), note.get("config", ""))
        if "key" in note:
            if wrong := files.mismatch(note, _POSITIONS):
                files.warn_once(f"{path} is damaged: {wrong}; its other entries are used")
            else:
                progress.key, progress.status = note["key"], note["status"]
                progress.former = [pair for pair in note["former"] if _is_list_of(pair, str, str)]
            progress.metrics = _position(note.get("metrics"))
            progress.events = _position(note.get("events"))
        return progress

    def write(self, folder: Path) -> None:
        """Write `tracking.json`; raises OSError."""
        files.write_json(folder / TRACKING, asdict(self))


def unsent_bytes(folder: Path, progress: Progress) -> int:
    """Bytes of whole lines of metrics and events that stand after the positions in `progress`."""
    metrics = unsent_lines(folder / METRICS, progress.metrics, {})
    events = unsent_lines(folder / EVENTS, progress.events, {})
    return sum(position.length for _, position in (*metrics, *events))


def unsent_lines(
    path: Path, after: Position, shape: files.Shape
) -> Iterator[tuple[dict[str, Any] | None, Position]]:
    """The whole lines after a position, each with its own; None for a damaged one.

    If the line before the position is another one, the file was rewritten: it is read from the
    first line. The damage was reported by `files.read_lines` when the attempt began.
    """
    with suppress(FileNotFoundError, IsADirectoryError), path.open("rb") as file:
        file.seek(max(after.end - after.length, 0))
        if zlib.crc32(file.read(after.length)) != after.crc:
            file.seek(0)
        end = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is being written, or was cut short
            end += len(line)
            yield files.parse_line(line, shape)[0], Position(end, len(line), zlib.crc32(line))


def adopt_old_journal(run_dir: Path) -> None:
    """Take over what waits for MLflow in a run that an earlier version began.

    Artifacts in the journal become an event. Its metrics are those of `metrics.jsonl`.
    """
    folder = run_dir / _OLD_JOURNAL
    if not folder.is_dir():
        return
    progress, artifacts = Progress.read(run_dir), {}
    entries = _waiting_entries(folder)
    for entry in entries:
        match entry:
            case {"kind": "artifact", "path": str(path), "folder": str(parent)}:
                artifacts[f"{parent}/{Path(path).name}".lstrip("/")] = path
            case {"kind": "text", "path": str(path), "text": str(text)}:
                with suppress(ValueError):
                    artifacts[path] = json.loads(text)
            case {"kind": "former", "run_id": str(run_id), "key": str(key)}:
                progress.former.append([run_id, key])
    try:
        with suppress(FileNotFoundError):
            saved = (folder / "key").read_bytes()
            progress.key = saved.decode() if re.fullmatch(rb"[0-9a-f]{32}", saved) else ""
        if artifacts:
            row = {"event": "adopted", "step": 0, "time": time.time(), "artifacts": artifacts}
            files.append_line(run_dir / EVENTS, row)
        if not entries:
            progress.status = "FINISHED"
            progress.metrics = _end_of(run_dir / METRICS)
            progress.events = _end_of(run_dir / EVENTS)
        progress.write(run_dir)
        shutil.rmtree(folder)
    except OSError as error:
        files.warn_once(f"{folder} is not sent to MLflow: {error}")


def _waiting_entries(folder: Path) -> list[dict[str, Any]]:
    data, sent = b"", 0  # all entries are sent again if `taken` is damaged
    with suppress(OSError):
        data = (folder / "journal.jsonl").read_bytes()
    with suppress(OSError, ValueError):
        sent = max(int((folder / "taken").read_bytes()), 0)
    entries = [files.parse_line(line, {"kind": str})[0] for line in data[sent:].split(b"\n")]
    return [entry for entry in entries if entry is not None]


def _end_of(path: Path) -> Position:
    return [START, *(position for _, position in unsent_lines(path, START, {}))][-1]


def _position(value: Any) -> Position:
    return Position(*value) if _is_list_of(value, int, int, int) and value[1] > 0 else START


def _is_list_of(value: Any, *types: type) -> bool:
    return isinstance(value, list) and [type(v) for v in value] == [*types]
