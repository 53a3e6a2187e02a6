import json
import pickle

import pytest

from mdm.sources import ultrachat
from mdm.sources.record import BadRecord, RawRecord


def read_all(root, split="train", **options):
    return [r for u in ultrachat.units(root, split, **options) for r in ultrachat.read(u)]


def test_demo_dialogues(demo):
    records = read_all(demo / "dialogues")
    assert len(records) > 40
    assert all(isinstance(r, RawRecord) for r in records)
    assert all(len(r.turns) % 2 == 0 and r.image is None for r in records)
    rows = (demo / "dialogues" / "train_0.jsonl").read_text().splitlines()
    assert [list(r.turns) for r in records] == [json.loads(row)["data"] for row in rows]


@pytest.mark.parametrize("unit_bytes", [1, 17, 100, 1000, 10**6])
def test_any_cut_gives_each_line_once(demo, unit_bytes):
    whole = read_all(demo / "dialogues")
    units = ultrachat.units(demo / "dialogues", "train", unit_bytes=unit_bytes)
    assert [r for u in units for r in ultrachat.read(u)] == whole
    assert len({u.fingerprint for u in units}) == len(units)
    assert pickle.loads(pickle.dumps(units)) == units


def test_fingerprint_follows_the_content_size_not_the_place(demo, tmp_path):
    data = (demo / "dialogues" / "train_0.jsonl").read_bytes()
    (tmp_path / "train_0.jsonl").write_bytes(data)
    (here,) = ultrachat.units(tmp_path, "train")
    (there,) = ultrachat.units(demo / "dialogues", "train")
    assert here.fingerprint == there.fingerprint
    (tmp_path / "train_0.jsonl").write_bytes(data + b"\n")
    assert ultrachat.units(tmp_path, "train")[0].fingerprint != there.fingerprint


def test_broken_rows_are_reported_one_by_one(tmp_path):
    rows = [
        b'{"id": "good", "data": ["hi", "hello"]}',
        b'{"id": "latin", "data": ["caf\xe9", "x"]}',
        b'{"id": "cut", "data": ["hi',
        b'{"id": "none", "data": []}',
        b'{"id": "blank", "data": ["hi", "  "]}',
        b'{"id": "odd", "data": ["a", "b", "c"]}',
        b'{"id": "number", "data": ["a", 7]}',
        b'{"id": "nodata"}',
        b'{"data": ["a", "b"]}',
        b'{"id": "half", "data": ["\\ud800", "b"]}',
        b"",
        b'{"id": "good", "data": ["again", "again"]}',
        b'{"id": 5, "data": ["last", "one"]}',
    ]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(rows))
    records = read_all(tmp_path)
    good = {r.id: r.turns for r in records if isinstance(r, RawRecord)}
    assert good == {
        "ultrachat/train/train/good": ("hi", "hello"),
        "ultrachat/train/train/5": ("last", "one"),
    }
    bad = [(r.id.rsplit("/", 1)[1], r.reason) for r in records if isinstance(r, BadRecord)]
    offset = len(rows[0]) + 1
    byte = rows[1].index(b"\xe9")
    assert bad[0] == (f"@{offset}", f"invalid UTF-8 at byte {byte} of the line")
    assert "invalid JSON" in bad[1][1]
    assert bad[2:] == [
        ("none", "empty dialogue"),
        ("blank", "field data[1] is empty"),
        ("odd", "dialogue of 3 turns: the last question has no reply"),
        ("number", "field data[1] is a number, not text"),
        ("nodata", "field data is absent"),
        (bad[7][0], "field id is absent"),
        ("half", "field data[0] holds half a surrogate pair, not valid Unicode"),
        ("good", "duplicate id"),
    ]


def test_file_that_vanishes_is_a_bad_record(demo, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": 1, "data": ["a", "b"]}\n')
    (unit,) = ultrachat.units(tmp_path, "train")
    (tmp_path / "train.jsonl").unlink()
    (record,) = ultrachat.read(unit)
    assert isinstance(record, BadRecord)
    assert "no such file" in record.reason


def test_missing_files_and_unknown_split_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no train\.jsonl"):
        ultrachat.units(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev'; choose one of train, test"):
        ultrachat.units(tmp_path, "dev")
