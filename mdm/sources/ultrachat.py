"""UltraChat: JSON lines `{"id", "data": [user, assistant, user, ...]}`, or the 200k set's parquet.

JSON lines of a split are `<split>.jsonl` and `<split>_*.jsonl` (published: `train_0.jsonl` ...); a
unit is a range of one file's bytes and owns the lines that begin inside it. The 200k set is
`data/{train,test}_{sft,gen}-*.parquet`, columns `prompt, prompt_id, messages [{content, role}]`; a
unit is a run of row groups. There `train` and `test` are short for `train_sft` and `test_sft`;
`prompt` repeats the first message and is left.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources.fields import id_field, list_field, object_field, text_field
from mdm.sources.record import (
    UNIT_BYTES,
    BadRecord,
    RawRecord,
    Unit,
    check_split,
    fingerprint,
    one_record,
)
from mdm.sources.streams import MAX_MEMBER_BYTES, bounded_lines, describe, parse_row

SOURCE = "ultrachat"
SPLITS: tuple[str, ...] = ("train", "test", "train_sft", "test_sft", "train_gen", "test_gen")
TRAINING: tuple[tuple[str, ...], ...] = (("train",), ("train_gen",))
HELD_OUT = "test"
_ROLES = ("user", "assistant")
_COLUMNS = ("prompt_id", "messages")
_BATCH_ROWS = 64
# The published row groups hold 1,000 dialogues of about 7 kB.
_MAX_GROUP_BYTES = 4 * MAX_MEMBER_BYTES


def units(root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Pieces of about `unit_bytes` of the split's files; ValueError without any file."""
    check_split(SOURCE, split, SPLITS)
    lines = sorted({*root.glob(f"{split}.jsonl"), *root.glob(f"{split}_*.jsonl")})
    name = f"{split}_sft" if split in SPLITS[:2] else split
    tables = sorted(
        path for folder in ("data", ".") for path in root.glob(f"{folder}/{name}-*.parquet")
    )
    if not lines and not tables:
        wanted = f"{split}.jsonl, {split}_*.jsonl or data/{name}-*.parquet"
        raise ValueError(f"{SOURCE}: no {wanted} in {root}")
    pieces = [("lines", path, *cut) for path in lines for cut in _line_cuts(path, unit_bytes)]
    if not lines:
        pieces = [("rows", path, *cut) for path in tables for cut in _group_cuts(path, unit_bytes)]
    return [
        Unit(
            source=SOURCE,
            split=split,
            index=index,
            root=str(root),
            kind=kind,
            files=(path.relative_to(root).as_posix(),),
            fingerprint=fingerprint(
                [(path.name, path.stat().st_size), ("start", start), ("stop", stop)]
            ),
            start=start,
            stop=stop,
        )
        for index, (kind, path, start, stop) in enumerate(pieces)
    ]


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The unit's dialogues. Ids are `ultrachat/<split>/<file>/<id>`."""
    name = unit.files[0]
    prefix = f"{SOURCE}/{unit.split}/{Path(name).stem}"
    seen: set[str] = set()
    for place, row in _lines(unit) if unit.kind == "lines" else _rows(unit):
        origin, key = f"{name}@{place}", f"{prefix}/@{place}"
        try:
            if isinstance(row, ValueError):
                raise row
            with one_record(origin):
                if unit.kind == "lines":
                    key = f"{prefix}/{id_field(row.get('id'), 'id')}"
                    turns = _turns(row)
                else:
                    key = f"{prefix}/{id_field(row.get('prompt_id'), 'prompt_id')}"
                    turns = _messages(row)
            if key in seen:
                raise ValueError("duplicate id")
        except ValueError as error:
            yield BadRecord(key, SOURCE, unit.split, origin, str(error))
            continue
        seen.add(key)
        yield RawRecord(key, SOURCE, unit.split, origin, turns=turns)


def texts(root: Path, split: str) -> Iterator[str]:
    """Every turn of every usable dialogue."""
    for unit in units(root, split):
        for record in read(unit):
            if isinstance(record, RawRecord):
                yield from record.turns


def _whole(turns: tuple[str, ...]) -> tuple[str, ...]:
    if not turns:
        raise ValueError("empty dialogue")
    if len(turns) % 2:
        raise ValueError(f"dialogue of {len(turns)} turns: the last question has no reply")
    return turns


# ---- JSON lines


def _line_cuts(path: Path, unit_bytes: int) -> list[tuple[int, int]]:
    size = path.stat().st_size
    return [(start, min(size, start + unit_bytes)) for start in range(0, size, unit_bytes)]


def _lines(unit: Unit) -> Iterator[tuple[int, Any]]:
    """(byte, row or its ValueError) of the lines that begin in the unit."""
    try:
        with (Path(unit.root) / unit.files[0]).open("rb") as file:
            if unit.start:
                # The byte before tells whether a line begins here; if not, it is the last unit's.
                file.seek(unit.start - 1)
                for _ in bounded_lines(file):
                    break
            lines = bounded_lines(file)
            while (offset := file.tell()) < unit.stop and (line := next(lines, b"")):
                if not line.strip():
                    continue
                row: Any
                try:
                    with one_record(f"{unit.files[0]}@{offset}"):
                        row = parse_row(line)
                except ValueError as error:
                    row = error
                yield offset, row
    except OSError as error:
        yield unit.start, ValueError(f"unreadable: {describe(error)}")


def _turns(row: dict[str, Any]) -> tuple[str, ...]:
    data = row.get("data")
    if data is not None and not isinstance(data, list):
        raise ValueError("field data is not a list of turns")
    turns = list_field(data, "data")
    return _whole(tuple(text_field(turn, f"data[{i}]") for i, turn in enumerate(turns)))


# ---- parquet


def _group_cuts(path: Path, unit_bytes: int) -> list[tuple[int, int]]:
    """Runs of row groups; one empty run for a file that cannot be opened: its reader says why."""
    import pyarrow.parquet as pq  # a tenth of a second that the other form need not pay

    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except (OSError, ValueError):
        return [(0, 0)]
    cuts, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > unit_bytes:
            cuts.append(i)
            filled = 0
        filled += size
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))


def _rows(unit: Unit) -> Iterator[tuple[str, Any]]:
    """(row group:row, row or its ValueError) of the unit's row groups, a small batch at a time."""
    import pyarrow.parquet as pq

    place = f"{unit.start}:0"
    try:
        with pq.ParquetFile(Path(unit.root) / unit.files[0]) as file:
            absent = [c for c in _COLUMNS if c not in file.schema_arrow.names]
            if absent:
                raise ValueError(f"no column {' and '.join(absent)}")
            for group in range(unit.start, unit.stop):
                yield from _group_rows(file, group)
    except (OSError, ValueError) as error:
        yield place, ValueError(f"unreadable parquet: {describe(error)}")


def _group_rows(file: Any, group: int) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        size = file.metadata.row_group(group).total_byte_size
        if size > _MAX_GROUP_BYTES:
            raise ValueError(f"decompression bomb: a row group of {size} bytes")
        batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(_COLUMNS))
        for batch in batches:
            for i in range(batch.num_rows):
                row: Any
                try:
                    with one_record(passing=(UnicodeDecodeError,)):
                        row = batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    row = ValueError(f"invalid UTF-8: {error.reason}")
                except ValueError as error:
                    row = error
                yield f"{group}:{number}", row
                number += 1
    except (OSError, ValueError) as error:
        problem = f"unreadable row group {group} after {number} rows: {describe(error)}"
        yield f"{group}:{number}", ValueError(problem)


def _messages(row: dict[str, Any]) -> tuple[str, ...]:
    turns = []
    for i, message in enumerate(list_field(row.get("messages"), "messages")):
        where = f"messages[{i}]"
        message = object_field(message, where)
        role = text_field(message.get("role"), f"{where}.role")
        if role != _ROLES[i % 2]:
            raise ValueError(f"field {where}.role is {role[:80]!r}, not {_ROLES[i % 2]!r}")
        turns.append(text_field(message.get("content"), f"{where}.content"))
    return _whole(tuple(turns))
