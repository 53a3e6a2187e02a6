import io
import os
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
from scipy.io import savemat

from mdm.sources import imagenet, imagenet_classes
from mdm.sources.record import BadRecord, RawRecord
from tests.published_sets import tar_bytes, write_tgz

WNIDS = ("n00000001", "n00000002", "n00000003")
# ILSVRC ids are not in the order of the wnids.
ILSVRC = {1: "n00000003", 2: "n00000001", 3: "n00000002"}


def read_all(root, split, **options):
    return [r for u in imagenet.units(root, split, **options) for r in imagenet.read(u)]


@pytest.fixture
def tars(tmp_path):
    """As published: a tar of tars, the val tar, and a devkit with meta.mat and ground truth."""
    inner = [
        (f"{w}.tar", tar_bytes((f"{w}_{i}.JPEG", f"{w}{i}".encode() * 99) for i in range(4)))
        for w in reversed(WNIDS)
    ]
    (tmp_path / imagenet.TRAIN_TAR).write_bytes(tar_bytes(inner))
    val = [(f"ILSVRC2012_val_{i:08d}.JPEG", b"v%d" % i * 300) for i in range(1, 7)]
    (tmp_path / imagenet.VAL_TAR).write_bytes(tar_bytes(val))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.empty((5, 1), dtype=kind)
    fields = [(i, w, f"name {w}, other {w}", 0) for i, w in ILSVRC.items()]
    fields += [(4, "n90000000", "animal", 2), (5, "n90000001", "vehicle", 1)]
    for index, values in enumerate(fields):
        synsets[index, 0] = values
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    files = {"data/meta.mat": mat.getvalue()}
    files["data/ILSVRC2012_validation_ground_truth.txt"] = b"1\n2\n3\n1\n2\n3\n"
    devkit = imagenet_classes.DEVKIT
    members = [(f"{devkit}/{name}", data) for name, data in files.items()]
    write_tgz(tmp_path / f"{devkit}.tar.gz", members)
    return tmp_path


def test_digits_of_the_demo_are_read_with_labels_and_captions(demo):
    root = demo / "digits"
    assert len(imagenet.class_names(root)) == 10
    assert imagenet.class_names(root)[7] == "seven, digit seven, handwritten seven"
    for split, per_class in (("train", 5), ("val", 1)):
        records = read_all(root, split)
        assert all(isinstance(r, RawRecord) for r in records)
        assert Counter(r.label for r in records) == dict.fromkeys(range(10), per_class)
        for r in records:
            assert f"/n{r.label:08d}/" in r.id
            assert r.text in imagenet_classes.split_names(imagenet.class_names(root)[r.label])
            assert (root / r.origin).read_bytes() == r.image
    assert set(imagenet.texts(root, "train")) > {"zero", "digit nine", "handwritten one"}


def test_captions_are_reproducible_and_use_every_name():
    names = "seven, digit seven, handwritten seven"
    counts = Counter(imagenet.caption(names, f"id {i}") for i in range(300))
    assert set(counts) == set(imagenet_classes.split_names(names))
    assert min(counts.values()) > 70
    assert imagenet.caption(names, "id 1") == imagenet.caption(names, "id 1")


def test_folder_units_of_any_size_hold_each_image_once_and_mix_the_classes(demo):
    root = demo / "digits"
    whole = read_all(root, "train")
    units = imagenet.units(root, "train", unit_bytes=8000)
    assert len(units) > 3
    assert [r for u in units for r in imagenet.read(u)] == whole
    assert all(len({f.split("/")[1] for f in u.files}) > 3 for u in units[:-1])
    assert units == imagenet.units(root, "train", unit_bytes=8000)


def test_published_tars_are_read_with_labels_and_captions(tars):
    train = read_all(tars, "train")
    assert all(isinstance(r, RawRecord) for r in train)
    assert len(imagenet.units(tars, "train")) == 3
    assert {(r.id, r.label, r.image) for r in train} == {
        (f"imagenet/train/{w}/{w}_{i}.JPEG", label, f"{w}{i}".encode() * 99)
        for label, w in enumerate(WNIDS)
        for i in range(4)
    }
    val = read_all(tars, "val")
    truth = [ILSVRC[i] for i in (1, 2, 3, 1, 2, 3)]
    assert [r.label for r in val] == [WNIDS.index(w) for w in truth]
    assert val[0].id == f"imagenet/val/{truth[0]}/ILSVRC2012_val_00000001.JPEG"
    assert val[5].image == b"v6" * 300
    assert val[0].text in ("name n00000003", "other n00000003")
    units = imagenet.units(tars, "val", unit_bytes=2000)
    assert len(units) > 2
    assert [r for u in units for r in imagenet.read(u)] == val


def test_tars_and_their_extracted_folders_give_the_same_records(tars, tmp_path):
    folder = tmp_path / "extracted"
    shutil.copytree(tars, folder, ignore=shutil.ignore_patterns("*.tar", "extracted"))
    for split in imagenet.SPLITS:
        for r in read_all(tars, split):
            path = folder / split / r.id.split("/")[2] / r.id.split("/")[3]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(r.image)
        content = lambda r: (r.id, r.label, r.text, r.image)  # noqa: E731
        assert sorted(map(content, read_all(folder, split))) == sorted(
            map(content, read_all(tars, split))
        )


def test_flat_validation_images_have_the_labels_of_the_devkit(tars, tmp_path):
    whole = read_all(tars, "val")
    flat = tmp_path / "flat"
    (flat / "val").mkdir(parents=True)
    shutil.copy(tars / f"{imagenet_classes.DEVKIT}.tar.gz", flat)
    with tarfile.open(tars / imagenet.VAL_TAR) as tar:
        tar.extractall(flat / "val", filter="data")
    for unit_bytes in (1 << 30, 700):
        records = sorted(read_all(flat, "val", unit_bytes=unit_bytes), key=lambda r: r.origin)
        assert [(r.id, r.label, r.text, r.image) for r in records] == [
            (r.id, r.label, r.text, r.image) for r in whole
        ]
    assert records[0].origin == "val/ILSVRC2012_val_00000001.JPEG"
    (flat / "val/ILSVRC2012_val_00000007.JPEG").write_bytes(b"x")
    (flat / "val/notes.txt").write_bytes(b"x")
    (flat / "val/n00000001").mkdir()
    (flat / "val/n00000001/own.JPEG").write_bytes(b"own")
    records = read_all(flat, "val")
    bad = {r.origin: r.reason for r in records if isinstance(r, BadRecord)}
    assert bad == {
        "val/ILSVRC2012_val_00000007.JPEG": "no label: image number '00000007', "
        "but labels are for 1 to 6",
        "val/notes.txt": "no label: image number 'notes', but labels are for 1 to 6",
    }
    assert len(records) == 9
    (flat / imagenet_classes.MAPPING).write_text("n00000001 one\n")
    (flat / f"{imagenet_classes.DEVKIT}.tar.gz").unlink()
    imagenet_classes.ground_truth.cache_clear()
    imagenet_classes.devkit_classes.cache_clear()
    with pytest.raises(ValueError, match="no devkit"):
        imagenet.units(flat, "val")


def test_entries_that_are_not_images_are_reported(demo, tmp_path):
    shutil.copytree(demo / "digits", tmp_path / "d")
    folder = tmp_path / "d" / "train"
    (folder / "stray.JPEG").write_bytes(b"x")
    (folder / "n00000001" / "deeper").mkdir()
    os.mkfifo(folder / "n00000001" / "pipe.JPEG")
    bad = {
        r.origin: r.reason for r in read_all(tmp_path / "d", "train") if isinstance(r, BadRecord)
    }
    assert bad == {
        "train/stray.JPEG": "image outside a class's tar or folder",
        "train/n00000001/deeper": "a folder in place of an image",
        "train/n00000001/pipe.JPEG": "not a regular file",
    }


def test_a_truncated_train_tar_keeps_complete_images(tars):
    path = tars / imagenet.TRAIN_TAR
    path.write_bytes(path.read_bytes()[:-14_000])  # into the last class, zero padding included
    records = read_all(tars, "train")
    good = [r for r in records if isinstance(r, RawRecord)]
    bad = [r for r in records if isinstance(r, BadRecord)]
    assert 8 <= len(good) < 12
    assert bad
    assert "unreadable tar n00000001.tar after" in bad[0].reason


def test_a_damaged_header_of_the_val_tar_loses_only_its_image(tars):
    path = tars / imagenet.VAL_TAR
    data = bytearray(path.read_bytes())
    data[3 * 1536 + 10] ^= 0xFF  # header of the fourth image
    path.write_bytes(bytes(data))
    records = read_all(tars, "val")
    good = [r.origin[-13:] for r in records if isinstance(r, RawRecord)]
    assert good == [f"{i:08d}.JPEG" for i in (1, 2, 3, 5, 6)]
    bad = [r for r in records if isinstance(r, BadRecord)]
    assert len(bad) == 1
    assert "unreadable tar bytes 4608-6144" in bad[0].reason


def test_unreadable_names_links_and_files_are_reported(demo, tmp_path):
    shutil.copytree(demo / "digits", tmp_path / "d")
    folder = tmp_path / "d" / "train"
    (folder / "n99999999").mkdir()
    (folder / "n99999999" / "x.JPEG").write_bytes(b"x")
    os.symlink("nowhere", folder / "n00000001" / "dangling.JPEG")
    latin_1 = os.fsencode(folder / "n00000001") + b"/caf\xe9.JPEG"
    with open(latin_1, "wb") as file:
        file.write(b"x")
    (unit,) = imagenet.units(tmp_path / "d", "train")
    missing = unit.files[0] if "n00000001" not in unit.files[0] else unit.files[1]
    (tmp_path / "d" / missing).unlink()
    records = list(imagenet.read(unit))
    bad = {r.id.rsplit("/", 1)[1]: r.reason for r in records if isinstance(r, BadRecord)}
    assert bad == {
        "x.JPEG": "'n99999999' is not among the classes",
        "dangling.JPEG": "missing file: broken symbolic link",
        "caf\\udce9.JPEG": "file name is not valid UTF-8",
        missing.rsplit("/", 1)[1]: "missing file",
    }
    assert len(records) == 50 + 3


def test_missing_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(ValueError, match=r"no class names in .*LOC_synset_mapping\.txt"):
        imagenet.units(tmp_path, "train")
    (tmp_path / imagenet_classes.MAPPING).write_text("n00000001 one\n")
    with pytest.raises(ValueError, match=r"neither folder val/ nor ILSVRC2012_img_val\.tar"):
        imagenet.units(tmp_path, "val")
    one_image = tar_bytes([("ILSVRC2012_val_00000001.JPEG", b"x")])
    (tmp_path / imagenet.VAL_TAR).write_bytes(one_image)
    with pytest.raises(ValueError, match="no devkit"):
        imagenet.units(tmp_path, "val")


def test_a_bad_label_loses_only_its_image(tars):
    with tarfile.open(tars / f"{imagenet_classes.DEVKIT}.tar.gz") as tar:
        tar.extractall(tars, filter="data")
    truth = tars / imagenet_classes.DEVKIT / "data" / imagenet_classes.TRUTH
    lines = truth.read_text().splitlines()
    truth.write_text("\r\n".join(["999", "", *lines[2:]]) + "\r\n\n")
    imagenet_classes.ground_truth.cache_clear()
    records = read_all(tars, "val")
    bad = {r.id: r.reason for r in records if isinstance(r, BadRecord)}
    line = f"no label: line %d of {imagenet_classes.TRUTH} is %r, not a class id"
    assert bad == {
        "imagenet/val//ILSVRC2012_val_00000001.JPEG": line % (1, "999"),
        "imagenet/val//ILSVRC2012_val_00000002.JPEG": line % (2, ""),
    }
    assert len(records) == 6
    truth.write_text("x\n" * 6)
    imagenet_classes.ground_truth.cache_clear()
    with pytest.raises(ValueError, match="holds no class id"):
        imagenet.units(tars, "val")
