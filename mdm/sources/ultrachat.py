"""UltraChat: JSON lines `{"id", "data": [user, assistant, user, ...]}`, or the 200k set's parquet.

The JSON lines of a split are `<split>.jsonl` and `<split>_*.jsonl` (published: `train_0.jsonl`
...); a unit is a byte range of one file and reads the lines that start inside it. The 200k set is
`data/{train,test}_{sft,gen}-*.parquet`, columns `prompt, prompt_id, messages [{content, role}]`; a
unit is a run of row groups, read in small batches of rows. There, `train` and `test` are short for
`train_sft` and `test_sft`, and `prompt` is ignored because it repeats the first message. Replies
before the first question and a last question without a reply are dropped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources.fields import Turns, answered_turns, dialogue, id_field, list_field
from mdm.sources.record import (
    UNIT_BYTES,
    BadRecord,
    RawRecord,
    Unit,
    attempt,
    check_split,
    make_units,
    one_record,
    runs,
)
from mdm.sources.streams import describe, expect_utf8
from mdm.sources.textfile import (
    MAX_LINE_BYTES,
    check_utf8,
    is_blank,
    lines_with_offsets,
    parse_line,
)

SOURCE = "ultrachat"
SPLITS: tuple[str, ...] = ("train", "test", "train_sft", "test_sft", "train_gen", "test_gen")
TRAINING: tuple[tuple[str, ...], ...] = (("train",), ("train_gen",))
HELD_OUT = "test"
_COLUMNS = ("prompt_id", "messages")
# Limits of a batch read from a row group. Published rows have about 7 kB.
_BATCH_ROWS = 64
_BATCH_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20  # read buffer; without it, a column's packed bytes are read all at once


def units(root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Units of about `unit_bytes` of the split's files; ValueError if there are none."""
    check_split(SOURCE, split, SPLITS)
    lines = sorted({*root.glob(f"{split}.jsonl"), *root.glob(f"{split}_*.jsonl")})
    name = f"{split}_sft" if split in SPLITS[:2] else split
    tables = sorted([*root.glob(f"data/{name}-*.parquet"), *root.glob(f"{name}-*.parquet")])
    if not lines and not tables:
        choices = f"{split}.jsonl, {split}_*.jsonl or data/{name}-*.parquet"
        raise ValueError(f"{SOURCE}: no {choices} in {root}")
    kind, find_ranges = ("lines", _line_ranges) if lines else ("rows", _group_ranges)
    parts = []
    for path in lines or tables:
        file = (path.name, path.stat().st_size)
        for start, stop in find_ranges(path, unit_bytes):
            inputs = [file, ("start", start), ("stop", stop)]
            parts.append((kind, [path.relative_to(root).as_posix()], inputs, start, stop))
    return make_units(SOURCE, split, root, parts)


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The unit's dialogues. Ids are `ultrachat/<split>/<file>/<id>`."""
    name = unit.files[0]
    prefix = f"{SOURCE}/{unit.split}/{Path(name).stem}"
    key = "id" if unit.kind == "lines" else "prompt_id"
    seen: set[str] = set()
    for place, entry in _lines(unit) if unit.kind == "lines" else _rows(unit):
        origin, record_id = f"{name}@{place}", f"{prefix}/@{place}"
        try:
            if isinstance(entry, ValueError):
                raise entry
            with one_record(origin):
                record_id = f"{prefix}/{id_field(entry.get(key), key)}"
                turns = _turns(entry, unit.kind)
            if record_id in seen:
                raise ValueError("duplicate id")
        except ValueError as error:
            yield unit.bad_record(record_id, origin, str(error))
            continue
        seen.add(record_id)
        yield RawRecord(record_id, SOURCE, unit.split, origin, turns=turns)


def texts(root: Path, split: str) -> Iterator[str]:
    """Every turn of every usable dialogue."""
    for unit in units(root, split):
        for record in read(unit):
            if isinstance(record, RawRecord):
                yield from record.turns


# ---- JSON lines


def _line_ranges(path: Path, unit_bytes: int) -> list[tuple[int, int]]:
    size = path.stat().st_size
    with expect_utf8(SOURCE, path), path.open("rb") as file:
        check_utf8(file.read(4))
    return [(start, min(size, start + unit_bytes)) for start in range(0, size, unit_bytes)]


def _lines(unit: Unit) -> Iterator[tuple[int, Any]]:
    """(byte, entry or its ValueError) of the lines that start in the unit."""
    try:
        with (Path(unit.root) / unit.files[0]).open("rb") as file:
            # Start one byte early and drop the first line: it is only that byte if a line starts
            # here, otherwise the rest of a line that belongs to the previous unit.
            file.seek(max(0, unit.start - 1))
            lines = lines_with_offsets(file)
            if unit.start:
                next(lines, None)
            for offset, line in lines:
                if offset >= unit.stop:
                    return
                if not is_blank(line):
                    yield offset, attempt(f"{unit.files[0]}@{offset}", parse_line, line)
    except OSError as error:
        yield unit.start, ValueError(f"unreadable: {describe(error)}")


def _turns(entry: dict[str, Any], kind: str) -> Turns:
    if kind == "rows":
        messages = list_field(entry.get("messages"), "messages")
        return dialogue(messages, "messages", ("role", "content"), ("user", "assistant"))
    turns = list_field(entry.get("data"), "data")
    return answered_turns([(f"data[{i}]", turn) for i, turn in enumerate(turns)], len(turns))


# ---- parquet


def _group_ranges(path: Path, unit_bytes: int) -> list[tuple[int, int]]:
    """Runs of row groups; one empty run for a file that cannot be opened, which `read` reports."""
    import pyarrow.parquet as pq  # takes a tenth of a second that the other form does not need

    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except (OSError, ValueError):
        return [(0, 0)]
    return runs(sizes, unit_bytes)


def _rows(unit: Unit) -> Iterator[tuple[str, Any]]:
    """(row group:row, row or its ValueError) of the unit's row groups, a small batch at a time.

    Row groups may be of any size: pages are read and unpacked only when their rows are needed.
    """
    import pyarrow.parquet as pq

    place = f"{unit.start}:0"
    try:
        path = Path(unit.root) / unit.files[0]
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
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
        metadata = file.metadata.row_group(group)
        row_bytes = metadata.total_byte_size // max(1, metadata.num_rows)
        options = {"row_groups": [group], "columns": list(_COLUMNS), "use_threads": False}
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
        for batch in file.iter_batches(rows, **options):
            for i in range(batch.num_rows):
                yield f"{group}:{number}", attempt("", _to_dict, batch.slice(i, 1))
                number += 1
    except (OSError, ValueError) as error:
        problem = f"unreadable row group {group} after {number} rows: {describe(error)}"
        yield f"{group}:{number}", ValueError(problem)


def _to_dict(row: Any) -> Any:
    """A record batch of one row as a dict; ValueError says what is wrong with it."""
    if row.nbytes > MAX_LINE_BYTES:
        raise ValueError(f"row of {row.nbytes} bytes is too large")
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8: {error.reason}") from None
