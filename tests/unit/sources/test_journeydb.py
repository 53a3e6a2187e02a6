import gzip
import json

import pytest

from mdm.sources import journeydb
from mdm.sources.journeydb import ANNOTATIONS
from mdm.sources.record import BadRecord, RawRecord
from tests.published_sets import write_tgz


def read_all(root, split="train"):
    return [r for u in journeydb.units(root, split) for r in journeydb.read(u)]


def annotation(path, **fields):
    return json.dumps({"img_path": path, "prompt": "a prompt", **fields}).encode()


def write_set(root, annotations, archives):
    write_tgz(root / ANNOTATIONS["train"], [("train.jsonl", b"\n".join(annotations) + b"\n")])
    for name, members in archives.items():
        write_tgz(root / f"data/train/imgs/{name}.tgz", members)


def test_scenes_of_the_demo_are_read_with_captions(demo):
    (unit,) = journeydb.units(demo / "journeydb", "train")
    assert unit.files[0].endswith("000.tgz")
    records = read_all(demo / "journeydb") + read_all(demo / "journeydb", "valid")
    assert len(records) == 120
    assert all(isinstance(r, RawRecord) for r in records)
    assert all(r.image[:2] == b"\xff\xd8" for r in records)
    assert len({r.id for r in records}) == 120
    assert sorted(journeydb.texts(demo / "journeydb", "train")) == sorted(
        r.text for r in records if r.split == "train"
    )


def test_the_caption_is_preferred_to_the_prompt(tmp_path):
    annotations = [
        annotation("./000/a.jpg", Task2={"Caption": "a caption"}),
        annotation("./000/b.jpg", Task2={}),
    ]
    write_set(tmp_path, annotations, {"000": [("000/a.jpg", b"A"), ("./000/b.jpg", b"B")]})
    assert [(r.id, r.text, r.image) for r in read_all(tmp_path)] == [
        ("journeydb/train/000/a.jpg", "a caption", b"A"),
        ("journeydb/train/000/b.jpg", "a prompt", b"B"),
    ]


def test_every_problem_is_reported_once_with_its_reason(tmp_path):
    annotations = [
        annotation("./001/good.jpg"),
        annotation("./001/gone.jpg"),
        annotation("./001/empty.jpg", prompt=" "),
        annotation("./001/list.jpg", Task2=[1]),
        annotation("./001/good.jpg", prompt="twice"),
        annotation("er.jpg"),
        annotation("../000/up.jpg"),
        b'{"img_path": "./001/x.jpg", "prompt": "\xff"}',
        b'{"img_path": "./001/',
        b'{"prompt": "nowhere"}',
        annotation("./007/far.jpg"),
        annotation("./007/away.jpg"),
    ]
    images = [("001/good.jpg", b"1"), ("001/stray.jpg", b"2"), ("001/good.jpg", b"3")]
    images += [("001/empty.jpg", b"4"), ("001/list.jpg", b"5")]
    write_set(tmp_path, annotations, {"000": [], "001": images})
    records = read_all(tmp_path)
    good = [r for r in records if isinstance(r, RawRecord)]
    assert [(r.id, r.image) for r in good] == [("journeydb/train/001/good.jpg", b"1")]
    bad = [
        (r.id.removeprefix("journeydb/train/"), r.reason)
        for r in records
        if isinstance(r, BadRecord)
    ]
    reasons = dict(bad)
    assert reasons["001/stray.jpg"] == "image without annotation"
    assert reasons["001/gone.jpg"] == "missing file: annotated, but not in the archive"
    assert reasons["001/empty.jpg"] == "field prompt is empty"
    assert reasons["001/list.jpg"] == "field Task2 is a list, not an object"
    assert sorted(reason for name, reason in bad if name == "001/good.jpg") == [
        "duplicate id: a second annotation of this image",
        "duplicate id: the archive holds this name twice",
    ]
    assert "not ./<archive>/<file>" in reasons["line 6"]
    assert "not ./<archive>/<file>" in reasons["line 7"]
    assert "invalid UTF-8" in reasons["line 8"]
    assert "invalid JSON" in reasons["line 9"]
    assert reasons["line 10"] == "field img_path is absent"
    assert "no archive 007.tgz for its 2 annotated" in reasons["007/"]
    assert len(bad) == 12  # nothing is reported twice


def test_a_truncated_archive_reports_its_missing_images(demo, tmp_path):
    (unit, *_) = journeydb.units(demo / "journeydb", "train")
    whole = [r.id for r in journeydb.read(unit)]
    for name in (ANNOTATIONS["train"], unit.files[0]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        data = (demo / "journeydb" / name).read_bytes()
        (tmp_path / name).write_bytes(data if "anno" in name else data[: len(data) // 2])
    (unit,) = journeydb.units(tmp_path, "train")
    records = list(journeydb.read(unit))
    good = [r.id for r in records if isinstance(r, RawRecord)]
    assert good == whole[: len(good)]
    assert 0 < len(good) < len(whole)
    lost = {r.id: r.reason for r in records if isinstance(r, BadRecord)}
    assert set(whole[len(good) :]) < set(lost)
    assert all(
        "unreadable archive after" in lost[name] and "missing file" in lost[name]
        for name in whole[len(good) :]
    )


def test_damaged_annotations_are_reported(tmp_path):
    write_set(tmp_path, [annotation("./000/a.jpg")], {"000": [("000/a.jpg", b"A")]})
    annotations = tmp_path / ANNOTATIONS["train"]
    annotations.write_bytes(gzip.compress(b"not a tar" * 200))
    reasons = [r.reason for r in read_all(tmp_path)]
    assert any("unreadable annotations after line 0" in reason for reason in reasons)
    assert "image without annotation" in reasons


def test_missing_annotations_and_archives_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no annotations data/valid/valid_anno_repath"):
        journeydb.units(tmp_path, "valid")
    write_set(tmp_path, [], {})
    with pytest.raises(ValueError, match=r"no data/train/imgs/\*\.tgz"):
        journeydb.units(tmp_path, "train")


def test_the_test_split_has_a_single_archive_and_annotations_without_prompt_are_reported(tmp_path):
    lines = [annotation("./imgs/a.jpg", prompt="a cat"), annotation("b.jpg", prompt=None)]
    write_tgz(tmp_path / ANNOTATIONS["test"], [("test_questions.jsonl", b"\n".join(lines))])
    members = {"imgs/a.jpg": b"A", "imgs/b.jpg": b"B", "imgs/c.jpg": b"C"}
    write_tgz(tmp_path / "data/test/imgs.tgz", members.items())
    records = {r.id.rpartition("/")[2]: r for r in read_all(tmp_path, "test")}
    assert (records["a.jpg"].text, records["a.jpg"].image) == ("a cat", b"A")
    reasons = {name: records[name].reason for name in ("b.jpg", "c.jpg")}
    assert reasons == {"b.jpg": "field prompt is absent", "c.jpg": "image without annotation"}
