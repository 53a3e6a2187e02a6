import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdm.sources import ultrachat
from mdm.sources.record import BadRecord, RawRecord
from tests.published_sets import ULTRACHAT, write_ultrachat_200k


def read_all(root, split="train", **options):
    return [r for u in ultrachat.units(root, split, **options) for r in ultrachat.read(u)]


def test_dialogues_of_the_demo_are_read(demo):
    records = read_all(demo / "dialogues")
    assert len(records) > 40
    assert all(isinstance(r, RawRecord) for r in records)
    assert all(len(r.turns) % 2 == 0 and r.image is None for r in records)
    lines = (demo / "dialogues" / "train_0.jsonl").read_text().splitlines()
    assert [list(r.turns) for r in records] == [json.loads(line)["data"] for line in lines]


@pytest.mark.parametrize("unit_bytes", [1, 17, 100, 1000, 10**6])
def test_units_of_any_size_give_each_line_once(demo, unit_bytes):
    whole = read_all(demo / "dialogues")
    units = ultrachat.units(demo / "dialogues", "train", unit_bytes=unit_bytes)
    assert [r for u in units for r in ultrachat.read(u)] == whole
    assert len({u.fingerprint for u in units}) == len(units)
    assert pickle.loads(pickle.dumps(units)) == units


def test_the_fingerprint_depends_on_size_but_not_on_the_folder(demo, tmp_path):
    data = (demo / "dialogues" / "train_0.jsonl").read_bytes()
    (tmp_path / "train_0.jsonl").write_bytes(data)
    (copy,) = ultrachat.units(tmp_path, "train")
    (original,) = ultrachat.units(demo / "dialogues", "train")
    assert copy.fingerprint == original.fingerprint
    (tmp_path / "train_0.jsonl").write_bytes(data + b"\n")
    assert ultrachat.units(tmp_path, "train")[0].fingerprint != original.fingerprint


def test_damaged_lines_are_reported_one_by_one(tmp_path):
    lines = [
        b'{"id": "good", "data": ["hi", "hello"]}',
        b'{"id": "latin", "data": ["caf\xe9", "x"]}',
        b'{"id": "cut", "data": ["hi',
        b'{"id": "none", "data": []}',
        b'{"id": "blank", "data": ["hi", "  "]}',
        b'{"id": "odd", "data": ["a", "b", "c"]}',
        b'{"id": "one", "data": ["a"]}',
        b'{"id": "number", "data": ["a", 7]}',
        b'{"id": "nodata"}',
        b'{"data": ["a", "b"]}',
        b'{"id": "half", "data": ["\\ud800", "b"]}',
        b"",
        b'{"id": "good", "data": ["again", "again"]}',
        b'{"id": 5, "data": ["last", "one"]}',
    ]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
    records = read_all(tmp_path)
    good = {r.id: r.turns for r in records if isinstance(r, RawRecord)}
    assert good == {
        "ultrachat/train/train/good": ("hi", "hello"),
        "ultrachat/train/train/odd": ("a", "b"),
        "ultrachat/train/train/5": ("last", "one"),
    }
    bad = [(r.id.rsplit("/", 1)[1], r.reason) for r in records if isinstance(r, BadRecord)]
    offset = len(lines[0]) + 1
    byte = lines[1].index(b"\xe9")
    assert bad[0] == (f"@{offset}", f"invalid UTF-8 at byte {byte} of the line")
    assert "invalid JSON" in bad[1][1]
    assert bad[2:] == [
        ("none", "empty dialogue"),
        ("blank", "field data[1] is empty"),
        ("one", "dialogue of 1 turns: no question has a reply"),
        ("number", "field data[1] is a number, not text"),
        ("nodata", "field data is absent"),
        (bad[7][0], "field id is absent"),
        ("half", "field data[0] holds half a surrogate pair, not valid Unicode"),
        ("good", "duplicate id"),
    ]


DIALOGUES = [[f"question {n}", f"answer {n}", "and?", "so."][: 2 + n % 2 * 2] for n in range(10)]


def test_parquet_of_the_200k_set_gives_the_same_records_for_units_of_any_size(tmp_path):
    write_ultrachat_200k(tmp_path, DIALOGUES)
    whole = read_all(tmp_path, "train_sft")
    assert [list(r.turns) for r in whole] == DIALOGUES
    stem = "train_sft-00000-of-00001-a3ecf92756993583"
    assert whole[4].id == f"ultrachat/train_sft/{stem}/{4:064x}"
    assert whole[4].origin == f"data/{stem}.parquet@1:1"
    units = ultrachat.units(tmp_path, "train_sft", unit_bytes=1)
    assert [(u.start, u.stop) for u in units] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert len({u.fingerprint for u in units}) == 4
    assert [r for u in units for r in ultrachat.read(u)] == whole
    assert [r.turns for r in read_all(tmp_path, "train")] == [r.turns for r in whole]
    assert len(list(ultrachat.texts(tmp_path, "train_sft"))) == 30
    with pytest.raises(ValueError, match=r"no test\.jsonl, .* or data/test_sft-\*\.parquet"):
        ultrachat.units(tmp_path, "test")


def test_damaged_parquet_rows_are_reported_one_by_one(tmp_path):
    user, reply = {"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}
    rows = [
        ("good", [user, reply]),
        ("system", [{"content": "be good", "role": "system"}, user, reply]),
        ("odd", [user]),
        ("none", []),
        ("null", None),
        ("blank", [user, {"content": " ", "role": "assistant"}]),
        ("absent", [user, {"content": None, "role": "assistant"}]),
        (None, [user, reply]),
        ("latin", [user, {"content": "LATIN", "role": "assistant"}]),
        ("good", [user, reply]),
    ]
    table = [{"prompt": "a", "prompt_id": i, "messages": m} for i, m in rows]
    path = tmp_path / "train_gen-00000-of-00001.parquet"
    pq.write_table(
        pa.Table.from_pylist(table, ULTRACHAT), path, compression="none", use_dictionary=False
    )
    path.write_bytes(path.read_bytes().replace(b"LATIN", b"LAT\xe9N"))
    records = read_all(tmp_path, "train_gen")
    bad = [(r.id.rsplit("/", 1)[1], r.reason) for r in records if isinstance(r, BadRecord)]
    assert bad == [
        ("system", "field messages[0].role is 'system', not 'user'"),
        ("odd", "dialogue of 1 turns: no question has a reply"),
        ("none", "empty dialogue"),
        ("null", "field messages is absent"),
        ("blank", "field messages[1].content is empty"),
        ("absent", "field messages[1].content is absent"),
        ("@0:7", "field prompt_id is absent"),
        ("@0:8", "invalid UTF-8: invalid continuation byte"),
        ("good", "duplicate id"),
    ]
    assert len(records) == 10


def test_a_damaged_row_group_loses_only_its_own_rows(tmp_path, monkeypatch):
    write_ultrachat_200k(tmp_path, DIALOGUES)
    (path,) = tmp_path.glob("data/*.parquet")
    whole, data = read_all(tmp_path, "train_sft"), path.read_bytes()
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(1)
    damaged = bytearray(data)
    damaged[column.dictionary_page_offset : column.dictionary_page_offset + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    records = read_all(tmp_path, "train_sft")
    assert [r for r in records if isinstance(r, RawRecord)] == whole[:3] + whole[6:]
    (bad,) = [r for r in records if isinstance(r, BadRecord)]
    assert bad.reason.startswith("unreadable row group 1 after 0 rows: ")
    path.write_bytes(data[:-20])
    (bad,) = read_all(tmp_path, "train_sft")
    assert bad.reason.startswith("unreadable parquet: ")
    pq.write_table(pa.table({"prompt_id": ["a"]}), path)
    (bad,) = read_all(tmp_path, "train_sft")
    assert bad.reason == "unreadable parquet: no column messages"
    path.write_bytes(data)
    monkeypatch.setattr(ultrachat, "MAX_LINE_BYTES", 150)
    records = read_all(tmp_path, "train_sft")
    assert [r.turns for r in records if isinstance(r, RawRecord)] == [
        tuple(t) for t in DIALOGUES if len(t) == 2
    ]
    assert {r.reason.split()[-1] for r in records if isinstance(r, BadRecord)} == {"large"}


READ_ALL = """
import sys
from itertools import islice
from pathlib import Path
import pyarrow.parquet
from mdm.sources import ultrachat
from mdm.sources.record import RawRecord

def peak_memory():  # MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) >> 10

(unit,) = ultrachat.units(Path(sys.argv[1]), "train_sft")
before = peak_memory()
print(sum(isinstance(r, RawRecord) for r in islice(ultrachat.read(unit), 4000)))
print(peak_memory() - before)
"""


def test_a_row_group_of_any_size_needs_little_memory(tmp_path):
    """The file has 192 MiB of dialogues in one row group, built without Python strings."""
    rows, size = 24 << 10, 8 << 10
    offsets = np.zeros(2 * rows + 1, np.int64)
    offsets[1:] = np.cumsum(np.tile([2, size - 2], rows))
    data = np.full(rows * size, ord("x"), np.uint8)
    content = pa.StringArray.from_buffers(
        2 * rows, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)
    )
    roles = pa.array(["user", "assistant"] * rows)
    messages = pa.ListArray.from_arrays(
        pa.array(np.arange(0, 2 * rows + 1, 2), pa.int32()),
        pa.StructArray.from_arrays([content, roles], ["content", "role"]),
    )
    ids = pa.array(np.arange(rows).astype(str))
    table = pa.table({"prompt": ids, "prompt_id": ids, "messages": messages})
    path = tmp_path / "train_sft-00000-of-00001.parquet"
    pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
    del table, messages, content, data
    with pq.ParquetFile(path) as file:
        assert file.num_row_groups == 1
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    out = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert out.returncode == 0, out.stderr
    records, growth = map(int, out.stdout.split())
    assert records == 4000
    assert growth < 120


def test_a_file_that_disappears_is_a_bad_record(demo, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": 1, "data": ["a", "b"]}\n')
    (unit,) = ultrachat.units(tmp_path, "train")
    (tmp_path / "train.jsonl").unlink()
    (record,) = ultrachat.read(unit)
    assert isinstance(record, BadRecord)
    assert "no such file" in record.reason


def test_missing_files_and_unknown_splits_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no train\.jsonl"):
        ultrachat.units(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev'; choose one of train, test"):
        ultrachat.units(tmp_path, "dev")
