"""What readers of annotations and images must do, tested on every published layout."""

import json
import pickle

import pytest

from mdm import sources
from mdm.sources.record import BadRecord, RawRecord
from tests import published_sets as sets
from tests.published_sets import image_bytes

WRITERS = {
    "coco": sets.write_coco,
    "flickr30k": sets.write_flickr30k,
    "gqa": sets.write_gqa,
    "ocrvqa": sets.write_ocrvqa,
    "textvqa": sets.write_textvqa,
    "visual_genome": sets.write_visual_genome,
    "vqav2": lambda root: sets.write_mscoco_vqa(root, "v2_"),
    "okvqa": lambda root: sets.write_mscoco_vqa(root, ""),
    "vizwiz": sets.write_vizwiz,
    "llava": sets.write_llava,
}
SPLITS = {"coco": "train2014", "flickr30k": "all", "visual_genome": "qa"}
# The archives offered for download, each with the folder or file it holds.
ARCHIVES = {
    "coco": [
        "train2014.zip:train2014",
        "annotations_trainval2014.zip:annotations",
    ],
    "flickr30k": [
        "flickr30k-images.tar.gz:flickr30k-images",
        "flickr30k.tar.gz:results_20130124.token",
    ],
    "gqa": ["images.zip:images", "questions1.2.zip:train_balanced_questions.json"],
    "ocrvqa": ["images.zip:images"],
    "textvqa": ["train_val_images.zip:train_images"],
    "visual_genome": [
        "images.zip:VG_100K",
        "images2.zip:VG_100K_2",
        "question_answers.json.zip:question_answers.json",
    ],
    "vqav2": [
        "train2014.zip:train2014",
        "v2_Questions_Train_mscoco.zip:v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_Annotations_Train_mscoco.zip:v2_mscoco_train2014_annotations.json",
    ],
    "okvqa": [
        "train2014.zip:train2014",
        "OpenEnded_mscoco_train2014_questions.json.zip:OpenEnded_mscoco_train2014_questions.json",
        "mscoco_train2014_annotations.json.zip:mscoco_train2014_annotations.json",
    ],
    "vizwiz": ["train.zip:train", "Annotations.zip:Annotations"],
    "llava": [
        "coco/train2017.zip:train2017",
        "gqa/images.zip:images",
        "textvqa/train_val_images.zip:train_images",
        "vg/images.zip:VG_100K",
        "vg/images2.zip:VG_100K_2",
    ],
}
COUNTS = {"coco": 6, "flickr30k": 15, "ocrvqa": 4, "visual_genome": 6, "vqav2": 4, "okvqa": 4}
COUNTS["llava"] = 7


@pytest.fixture(params=WRITERS)
def published(request, tmp_path):
    """(name, split, root, records) of a data set."""
    name = request.param
    root = WRITERS[name](tmp_path / "published")
    split = SPLITS.get(name, "train")
    return name, split, root, list(sources.records(name, root, split))


def offset(record):
    """The byte at which the record's entry starts."""
    return int(record.origin.split(", ")[0].rsplit("@", 1)[1])


def in_file_order(records):
    """Readers yield the records of one image together; this restores the file's order."""
    return sorted(records, key=lambda r: (offset(r), r.id))


def test_every_entry_is_a_record_with_its_image(published):
    name, split, root, records = published
    assert all(isinstance(r, RawRecord) for r in records), records
    assert len(records) == COUNTS.get(name, 3)
    assert len({r.id for r in records}) == len(records)
    for r in records:
        assert (r.source, r.split) == (name, split)
        assert r.id.startswith(f"{name}/{split}/")
        assert (r.text is None) == bool(r.turns)
        annotation, place = r.origin.split(", ")
        assert (root / annotation.split("@")[0]).is_file()
        assert r.image == image_bytes(place)
    texts = sorted(t for r in records for t in ((r.text,) if r.text else r.turns))
    assert sorted(sources.get(name).texts(root, split)) == texts


def test_units_of_any_size_give_the_same_records(published):
    name, split, root, records = published
    reader = sources.get(name)
    largest_count = 0
    for unit_bytes in (1, 50, 150, 400):
        units = reader.units(root, split, unit_bytes=unit_bytes)
        largest_count = max(largest_count, len(units))
        assert [u.index for u in units] == list(range(len(units)))
        assert len({u.fingerprint for u in units}) == len(units)
        units = pickle.loads(pickle.dumps(units))
        # In reverse order: a unit needs nothing from those before it.
        unit_records = [list(reader.read(u)) for u in reversed(units)]
        read_records = [r for part in reversed(unit_records) for r in part]
        assert in_file_order(read_records) == in_file_order(records)
    assert largest_count >= 3
    assert len(reader.units(root, split)) == 1


def test_published_archives_give_the_same_records_as_their_folders(published):
    name, split, root, records = published
    for archive in ARCHIVES[name]:
        sets.pack(root, archive)
    packed = in_file_order(sources.records(name, root, split))
    records = in_file_order(records)
    strip = lambda r: (r.id, r.text, r.turns, r.image)  # noqa: E731
    assert [strip(r) for r in packed] == [strip(r) for r in records]
    assert any("::" in r.origin for r in packed)
    if name != "flickr30k":  # its images are a single stream
        units = sources.get(name).units(root, split, unit_bytes=150)
        assert len(units) > 2
        unit_records = [r for u in units for r in sources.get(name).read(u)]
        assert in_file_order(unit_records) == in_file_order(packed)


def test_a_changed_image_changes_the_fingerprint_but_moving_the_folder_does_not(
    published, tmp_path
):
    name, split, root, records = published
    reader = sources.get(name)
    (before,) = reader.units(root, split)
    moved = tmp_path / "moved"
    root.rename(moved)
    assert reader.units(moved, split)[0].fingerprint == before.fingerprint
    (moved / records[0].origin.split(", ")[1]).write_bytes(b"another image")
    assert reader.units(moved, split)[0].fingerprint != before.fingerprint


def test_missing_images_are_bad_records_with_their_ids(published):
    name, split, root, records = published
    place = records[0].origin.split(", ")[1]
    (root / place).unlink()
    remaining = list(sources.records(name, root, split))
    bad = [r for r in remaining if isinstance(r, BadRecord)]
    lost_ids = {r.id for r in records if r.origin.endswith(f", {place}")}
    assert {r.id for r in bad} == lost_ids
    assert all(r.reason.startswith("missing file: ") for r in bad)
    assert [r for r in remaining if isinstance(r, RawRecord)] == [
        r for r in records if r.id not in lost_ids
    ]


def test_errors_name_missing_files_splits_and_images(published, tmp_path):
    name, split, root, _ = published
    reader = sources.get(name)
    with pytest.raises(ValueError, match=f"{name}: none of these files in {tmp_path}: "):
        reader.units(tmp_path, split)
    with pytest.raises(ValueError, match=f"{name} has no split 'dev'; choose one of"):
        reader.units(root, "dev")
    for place in root.rglob("*.[jp][pn]g"):
        place.unlink()
    with pytest.raises(ValueError, match=f"{name}: no images in .*; put one of these there: "):
        reader.units(root, split)


@pytest.mark.parametrize(
    ("name", "file", "content", "reason"),
    [
        ("coco", "annotations/captions_train2014.json", "", "no JSON object with a list"),
        ("coco", "annotations/captions_train2014.json", "[]", "no JSON object with a list"),
        ("coco", "annotations/captions_train2014.json", '{"images": []}', "no list 'annotations'"),
        ("coco", "annotations/captions_train2014.json", '{"annotations": 1}', "is not a list"),
        ("gqa", "train_balanced_questions.json", "{}", "holds no entry"),
        (
            "gqa",
            "train_balanced_questions.json",
            "<html>",
            "no JSON list or object: the file begins with '<'",
        ),
        ("visual_genome", "question_answers.json", '[{"id": 1,', "the entry at byte 1 has no end"),
        ("flickr30k", "results_20130124.token", "", "holds no entry"),
    ],
)
def test_a_file_without_entries_is_an_error(tmp_path, name, file, content, reason):
    root = WRITERS[name](tmp_path)
    (root / file).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: .*{file}.*{reason}"):
        sources.get(name).units(root, SPLITS.get(name, "train"))


def test_truncated_annotations_keep_complete_entries_and_report_the_rest(published):
    name, split, root, records = published
    file = root / records[0].origin.split("@")[0]
    data = file.read_bytes()
    records = in_file_order(records)
    last = offset(records[-1])
    file.write_bytes(data[: last + 9])
    remaining = list(sources.records(name, root, split))
    good = in_file_order(r for r in remaining if isinstance(r, RawRecord))
    assert (
        good == [r for r in records if not r.origin.startswith(f"{file.name}@{last}")][: len(good)]
    )
    assert 0 < len(good) < len(records)
    reasons = [r.reason for r in remaining if isinstance(r, BadRecord)]
    assert any("unreadable annotations after byte" in r or "line begins" in r for r in reasons)


def test_image_paths_never_reach_outside_the_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    root = sets.write_llava(tmp_path / "set")
    path = root / "llava_v1_5_mix665k.json"
    entries = json.loads(path.read_text())
    places = ["../secret.jpg", str(tmp_path / "secret.jpg"), "coco/../../secret.jpg", "a\0b", "vg"]
    for entry, place in zip(entries, places, strict=False):
        entry["image"] = place
    path.write_text(json.dumps(entries))
    records = list(sources.records("llava", root, "train"))
    assert [r.reason.split(":")[0] for r in records if isinstance(r, BadRecord)] == [
        *["image path points outside the data set"] * 3,
        "field image holds the control character U+0000",
        "a folder in place of an image",
    ]
    assert all(r.image != b"secret" for r in records if isinstance(r, RawRecord))


def test_records_of_one_image_come_together_and_the_image_is_read_once(published):
    _, _, _, records = published
    places = [r.origin.partition(", ")[2] for r in records if isinstance(r, RawRecord)]
    distinct = [p for i, p in enumerate(places) if not i or p != places[i - 1]]
    assert len(distinct) == len(set(distinct))
    images = [r.image for r in records if isinstance(r, RawRecord)]
    repeated = [i for i in range(1, len(places)) if places[i] == places[i - 1]]
    assert all(images[i] is images[i - 1] for i in repeated)


def test_training_and_held_out_splits_are_those_of_the_data_set(published):
    name, _, root, _ = published
    expected = {
        "flickr30k": ("all",),
        "llava": ("train", "train-text"),
        "visual_genome": ("qa", "regions"),
    }
    assert sources.training_splits(name, root) == expected.get(name, ("train",))
    assert sources.held_out_split(name, root) in ("", sources.get(name).HELD_OUT)
