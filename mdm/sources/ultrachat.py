"""UltraChat: JSON lines `{"id", "data": [user, assistant, user, ...]}`.

A split's files are `<split>.jsonl` and `<split>_*.jsonl` (published: `train_0.jsonl` ...).
A unit is a range of one file's bytes; it owns the lines that begin inside it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources.record import UNIT_BYTES, BadRecord, RawRecord, Unit, check_split, fingerprint
from mdm.sources.streams import bounded_lines, describe, parse_row, text_field

SOURCE = "ultrachat"
SPLITS: tuple[str, ...] = ("train", "test")


def units(root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Byte ranges of about `unit_bytes` over the split's files; ValueError without any file."""
    check_split(SOURCE, split, SPLITS)
    files = sorted({*root.glob(f"{split}.jsonl"), *root.glob(f"{split}_*.jsonl")})
    if not files:
        raise ValueError(f"{SOURCE}: no {split}.jsonl or {split}_*.jsonl in {root}")
    found: list[Unit] = []
    for path in files:
        size = path.stat().st_size
        for start in range(0, size, unit_bytes):
            stop = min(size, start + unit_bytes)
            found.append(
                Unit(
                    source=SOURCE,
                    split=split,
                    index=len(found),
                    root=str(root),
                    kind="lines",
                    files=(path.name,),
                    fingerprint=fingerprint([(path.name, size), ("start", start), ("stop", stop)]),
                    start=start,
                    stop=stop,
                )
            )
    return found


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The dialogues whose lines begin in the unit. Ids are `ultrachat/<split>/<file>/<id>`."""
    name = unit.files[0]
    prefix = f"{SOURCE}/{unit.split}/{Path(name).stem}"
    seen: set[str] = set()
    try:
        for offset, line in _lines(unit):
            if not line.strip():
                continue
            origin, key = f"{name}@{offset}", f"{prefix}/@{offset}"
            try:
                row = parse_row(line)
                key = f"{prefix}/{_identity(row)}"
                turns = _turns(row)
                if key in seen:
                    raise ValueError("duplicate id")
            except ValueError as error:
                yield BadRecord(key, SOURCE, unit.split, origin, str(error))
                continue
            seen.add(key)
            yield RawRecord(key, SOURCE, unit.split, origin, turns=turns)
    except OSError as error:
        yield BadRecord(
            f"{prefix}/@{unit.start}", SOURCE, unit.split, name, f"unreadable: {describe(error)}"
        )


def texts(root: Path, split: str) -> Iterator[str]:
    """Every turn of every usable dialogue."""
    for unit in units(root, split):
        for record in read(unit):
            if isinstance(record, RawRecord):
                yield from record.turns


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    with (Path(unit.root) / unit.files[0]).open("rb") as file:
        if unit.start:
            # The byte before tells whether a line begins here; if not, it is the last unit's.
            file.seek(unit.start - 1)
            for _ in bounded_lines(file):
                break
        lines = bounded_lines(file)
        while (offset := file.tell()) < unit.stop:
            line = next(lines, b"")
            if not line:
                break
            yield offset, line


def _identity(row: dict[str, Any]) -> str:
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(value, "id")


def _turns(row: dict[str, Any]) -> tuple[str, ...]:
    data = row.get("data")
    if data is None:
        raise ValueError("field data is absent")
    if not isinstance(data, list):
        raise ValueError("field data is not a list of turns")
    if not data:
        raise ValueError("empty dialogue")
    turns = tuple(text_field(turn, f"data[{i}]") for i, turn in enumerate(data))
    if len(turns) % 2:
        raise ValueError(f"dialogue of {len(turns)} turns: the last question has no reply")
    return turns
