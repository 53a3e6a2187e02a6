"""Damaged records get a correct reason in every layout, and no valid record is lost."""

import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mdm import sources
from mdm.first_stage.image import decode_image
from mdm.sources.record import RawRecord
from tests import published_sets as sets
from tests.unit.sources.damage import DAMAGED, UNUSUAL, noise, saved

GOOD = [saved(noise()) for _ in range(8)]


def outcome(name: str, root: Path, split: str) -> dict[str, str]:
    """Reason by the last part of the id; "" for a valid record."""
    reasons: dict[str, str] = {}
    for record in sources.records(name, root, split):
        key = record.id.split("/", 2)[2]
        assert key not in reasons
        try:
            if isinstance(record, RawRecord):
                record.id.encode()
                assert record.image is not None
                assert decode_image(record.image, 8).shape == (3, 8, 8)
            reasons[key] = "" if isinstance(record, RawRecord) else record.reason
        except ValueError as error:
            reasons[key] = str(error)
    return reasons


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_has_a_correct_reason(name: str) -> None:
    data, reason = DAMAGED[name]
    with pytest.raises(ValueError, match=reason):
        decode_image(data, 8)


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_image_is_kept(name: str) -> None:
    assert decode_image(UNUSUAL[name], 256).shape == (3, 256, 256)


def write_classes(root: Path, classes: int) -> None:
    lines = [f"n{label:08d} name {label}\n" for label in range(classes)]
    root.mkdir(exist_ok=True)
    (root / "LOC_synset_mapping.txt").write_text("".join(lines))


def test_stray_entries_in_imagenet_folders_are_reported(tmp_path: Path) -> None:
    write_classes(tmp_path, 2)
    for label in range(2):
        sets.write_images(tmp_path, [f"train/n{label:08d}/{i}.JPEG" for i in range(4)])
    for number, path in enumerate(sorted(tmp_path.glob("train/*/*.JPEG"))):
        path.write_bytes(GOOD[number])
    folder, train = tmp_path / "train" / "n00000000", tmp_path / "train"
    expected = {f"n{label:08d}/{i}.JPEG": "" for label in range(2) for i in range(4)}
    for name in ("new\nline.JPEG", "é日本\U0001f600.JPEG", "no extension", "x.JPEG.part"):
        (folder / name).write_bytes(saved(noise()))
        expected[f"n00000000/{name}"] = ""
    os.symlink("0.JPEG", folder / "link.JPEG")
    expected["n00000000/link.JPEG"] = ""
    os.symlink("loop.JPEG", folder / "loop.JPEG")
    expected["n00000000/loop.JPEG"] = "unreadable file: too many levels of symbolic links"
    os.symlink("loop", train / "loop")
    expected["/loop"] = "unreadable file: too many levels of symbolic links"
    os.symlink("gone", folder / "dangling.JPEG")
    expected["n00000000/dangling.JPEG"] = "missing file: broken symbolic link"
    (train / "n00000001" / "4.JPEG").mkdir()  # reported although it is empty
    expected["n00000001/4.JPEG"] = "a folder in place of an image"
    (folder / "folder.JPEG").mkdir()
    expected["n00000000/folder.JPEG"] = "a folder in place of an image"
    (folder / "Thumbs.txt").write_bytes(b"junk")
    expected["n00000000/Thumbs.txt"] = "not an image: begins with 'junk'"
    (train / "README").write_bytes(b"hello")
    expected["/README"] = "image outside a class's tar or folder"
    (train / "n99999999").mkdir()
    (train / "n99999999" / "0.JPEG").write_bytes(GOOD[0])
    expected["n99999999/0.JPEG"] = "'n99999999' is not among the classes"
    with open(os.fsencode(folder) + b"/\xff.JPEG", "wb") as file:
        file.write(GOOD[0])
    expected["n00000000/\\udcff.JPEG"] = "file name is not valid UTF-8"
    assert outcome("imagenet", tmp_path, "train") == expected


def test_files_without_read_permission_are_reported(tmp_path: Path) -> None:
    write_classes(tmp_path, 1)
    sets.write_coco(tmp_path, "train2017", 2)
    sets.write_images(tmp_path, ["train/n00000000/0.JPEG", "train/locked/0.JPEG"])
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)
    (tmp_path / "train" / "n00000000" / "0.JPEG").chmod(0)
    (tmp_path / "train" / "locked").chmod(0)
    for image in (tmp_path / "train2017").iterdir():
        image.chmod(0)
    script = """
import os, sys
from pathlib import Path
from mdm import sources
root = Path(sys.argv[1])
list(sources.READERS)
if os.geteuid() == 0:
    os.setuid(65534)
for name, split in (("imagenet", "train"), ("coco", "train2017")):
    for record in sources.records(name, root, split):
        print(record.id, record.reason, sep="|")
"""
    for path in [tmp_path, *tmp_path.parents][:3]:
        path.chmod(0o755)
    try:
        out = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )
    finally:
        (tmp_path / "train" / "locked").chmod(0o755)
    assert out.returncode == 0, out.stderr
    lines = dict(line.split("|") for line in out.stdout.splitlines())
    assert len(lines) == 6
    assert set(lines.values()) == {"unreadable file: permission denied"}


def with_bad_header(tar: bytes, name: str) -> bytes:
    at = tar.index(name.encode()) + 148
    return tar[:at] + b"7777777" + tar[at + 7 :]


def test_damaged_headers_in_imagenets_tar_of_tars_lose_only_their_members(tmp_path: Path) -> None:
    write_classes(tmp_path, 4)
    inner = [
        sets.tar_bytes([(f"n{c:08d}_{i}.JPEG", GOOD[2 * c + i]) for i in range(2)])
        for c in range(4)
    ]
    inner[3] = with_bad_header(inner[3], "n00000003_1.JPEG")
    outer = sets.tar_bytes([(f"n{c:08d}.tar", data) for c, data in enumerate(inner)])
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(with_bad_header(outer, "n00000001.tar"))
    reasons = outcome("imagenet", tmp_path, "train")
    kept = {key for key, reason in reasons.items() if not reason}
    assert kept == {f"n{c:08d}/n{c:08d}_{i}.JPEG" for c in (0, 2) for i in range(2)} | {
        "n00000003/n00000003_0.JPEG"
    }
    assert reasons.pop("n00000003/n00000003_1.JPEG").startswith("damaged tar header")
    lost = [reason for reason in reasons.values() if reason]
    assert len(lost) == 1
    assert lost[0].startswith("unreadable tar bytes")
    path.write_bytes(outer[: 2 * len(inner[0]) + 700])  # in the zeros after the second class
    lost = [reason for reason in outcome("imagenet", tmp_path, "train").values() if reason]
    assert len(lost) == 1
    assert "the archive was cut off at byte" in lost[0]


def test_damaged_journeydb_archives_and_annotations_lose_only_the_damaged_records(
    tmp_path: Path,
) -> None:
    archives = {a: [(f"{a}/{i}.jpg", GOOD[i]) for i in range(3)] for a in ("000", "001", "002")}
    names = [name for files in archives.values() for name, _ in files]
    lines = [json.dumps({"img_path": f"./{name}", "prompt": name}).encode() for name in names]
    lines[0] = b"\xef\xbb\xbf" + lines[0]
    lines[1] = lines[1][:-1] + b', "seed": ' + b"9" * 5000 + b"}"
    lines[2] = lines[2].replace(b"000/2", b"000/\xff")
    base = tmp_path / "data" / "train"
    name = "train_anno_realease_repath.jsonl"
    sets.write_tgz(base / f"{name}.tgz", [(name, b"\n".join(lines))])
    for archive, files in archives.items():
        data = sets.tar_bytes(files)
        if archive == "001":
            data = with_bad_header(data, "001/1.jpg")
        packed = gzip.compress(data) + (b"garbage" if archive == "002" else b"")
        (base / "imgs").mkdir(exist_ok=True)
        (base / "imgs" / f"{archive}.tgz").write_bytes(packed)
    reasons = outcome("journeydb", tmp_path, "train")
    kept = {key for key, reason in reasons.items() if not reason}
    assert kept == {"000/0.jpg", "001/0.jpg", "001/2.jpg", *(f"002/{i}.jpg" for i in range(3))}
    assert {key: reason for key, reason in reasons.items() if reason} == {
        "000/1.jpg": "image without annotation",
        "000/2.jpg": "image without annotation",
        "line 2": "invalid JSON: a number of thousands of digits",
        "line 3": reasons["line 3"],
        "001/1.jpg": "damaged tar header: bad checksum",
        "002/": reasons["002/"],
    }
    assert reasons["line 3"].startswith("invalid UTF-8 at byte")
    assert reasons["002/"].startswith("unreadable archive after 3 images: Not a gzipped file")


def test_coco_annotations_with_wrong_types_are_reported(tmp_path: Path) -> None:
    root = sets.write_coco(tmp_path, "train2017", 6)
    path = root / "annotations" / "captions_train2017.json"
    plain = json.loads(path.read_text())
    for image in (root / "train2017").iterdir():
        image.write_bytes(GOOD[int(image.stem) // 9])
    entries = {e["id"]: e for e in plain["annotations"]}
    changes: dict[int, tuple[str, object, str]] = {
        100: ("id", 1.5, "field id is a number, not a whole number"),
        200: ("id", True, "field id is a boolean, not text"),
        300: ("caption", None, "field caption is absent"),
        400: ("caption", float("nan"), "field caption is a number, not text"),
        500: ("caption", "half \ud83d pair", "field caption holds half a surrogate pair"),
        600: ("image_id", "54", "field image_id is text, not a whole number"),
        101: ("image_id", float("inf"), "field image_id is a number, not a whole number"),
        201: ("id", 301, "duplicate id"),
        501: ("caption", "a\0 cat", "field caption holds the control character U+0000"),
    }
    for key, (field, value, _) in changes.items():
        entries[key][field] = value
    entries[401]["caption"] = "c" * 100_000
    entries[601]["caption"] = "\u202e control \ufeff"
    path.write_text(json.dumps(plain))
    records = list(sources.records("coco", root, "train2017"))
    assert sum(isinstance(r, RawRecord) for r in records) == 3
    reasons = [r.reason for r in records if not isinstance(r, RawRecord)]
    for _, _, expected in changes.values():
        assert sum(r.startswith(expected) for r in reasons) == 1, (expected, reasons)
    assert len(reasons) == len(changes)


SMALL = json.dumps(
    {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)],
        "annotations": [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in range(6)],
    }
)


@pytest.mark.parametrize(
    ("content", "kept", "reason"),
    [
        (b"\xef\xbb\xbf" + SMALL.encode(), 6, ""),
        (SMALL.replace('2"}, ', '2"} ').encode(), 6, ""),  # a comma between two entries
        (SMALL.encode() + b"\0" * 99, 6, ""),
        (SMALL.replace("caption 2", "caf\xe9").encode("latin-1"), 5, "invalid UTF-8"),
        (SMALL.replace("caption 2", "a\nb").encode(), 5, "invalid JSON: Invalid control"),
        (SMALL.encode()[:-70], 4, "unreadable annotations after byte"),
        (SMALL.encode("utf-16"), 0, "the file is UTF-16, not UTF-8"),
        (gzip.compress(SMALL.encode()), 0, "no JSON object with a list 'annotations'"),
        (b"", 0, "the file is empty"),
        (b"<html>", 0, "the file begins with '<'"),
    ],
)
def test_damaged_annotation_files_keep_what_can_be_read(
    tmp_path: Path, content: bytes, kept: int, reason: str
) -> None:
    sets.write_images(tmp_path, [f"train2017/{i}.jpg" for i in range(6)])
    (tmp_path / "captions_train2017.json").write_bytes(content)
    if not kept:
        with pytest.raises(ValueError, match=re.escape(reason)):
            sources.get("coco").units(tmp_path, "train2017")
        return
    records = list(sources.records("coco", tmp_path, "train2017"))
    bad = [r.reason for r in records if not isinstance(r, RawRecord)]
    assert len(records) - len(bad) == kept
    assert [b[: len(reason)] for b in bad] == ([reason] if reason else [])


def test_vqav2_reports_the_file_of_an_answer_without_question(tmp_path: Path) -> None:
    root = sets.write_mscoco_vqa(tmp_path, "v2_")
    path = root / "v2_OpenEnded_mscoco_train2014_questions.json"
    plain = json.loads(path.read_text())
    removed = plain["questions"].pop()
    path.write_text(json.dumps(plain))
    bad = [r for r in sources.records("vqav2", root, "train") if not isinstance(r, RawRecord)]
    assert [r.id for r in bad] == [f"vqav2/train/{removed['question_id']}"]
    file, _, offset = bad[0].origin.partition("@")
    entry, _ = json.JSONDecoder().raw_decode((root / file).read_text()[int(offset) :])
    assert entry["question_id"] == removed["question_id"]


def test_a_damaged_zip_member_loses_only_its_own_records(tmp_path: Path) -> None:
    root = sets.write_coco(tmp_path, "train2017", 3)
    sets.write_zip(root / "t.zip", {}, zipfile.ZIP_STORED)
    names = sorted(p.name for p in (root / "train2017").iterdir())
    sets.pack(root, "train2017.zip:train2017")
    data = bytearray((root / "train2017.zip").read_bytes())
    at = data.index(names[1].encode()) + len(names[1]) + 2
    data[at] ^= 0xFF
    (root / "train2017.zip").write_bytes(data)
    records = list(sources.records("coco", root, "train2017"))
    bad = [r for r in records if not isinstance(r, RawRecord)]
    assert len(records) == 6
    assert {r.reason.split(":")[0] for r in bad} == {"damaged archive member"}
    assert len(bad) == 2
