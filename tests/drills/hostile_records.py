"""Drill of hostile records: 2,000 go through the real encode job."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mdm.data.manifest import Manifest
from mdm.data.schema import RecordBatch
from mdm.preprocess.verify import verify
from mdm.storage import open_store
from tests import hostile
from tests.drills.drill import Row, Setting
from tests.faults.encode_job import Job, error_line

IMAGES, ANNOTATIONS = 1500, 500
CLASSES = 4


def hostile_records(setting: Setting) -> Iterator[Row]:
    """Images with hostile metadata, intact or damaged; annotations with odd types and encodings.

    Intact images must give the latents of clean copies of their pixels, bit for bit.
    """
    job = Job(setting.folder / "job")
    began = time.monotonic()
    intact, damaged = write_images(setting.folder, setting.seed)
    manifest = encoded(job, setting.folder / "hostile", "imagenet", "train")
    clean = encoded(job, setting.folder / "clean", "imagenet", "train")
    seconds = time.monotonic() - began
    expected, bad = latents(clean), quarantined(manifest)
    kept = latents(manifest)
    correct = sum(np.array_equal(kept.get(key), expected[key]) for key in expected)
    survived = correct + len(damaged & bad.keys())
    wrong = (intact - kept.keys()) | (damaged & kept.keys())
    note = f"{len(damaged)} damaged" + (f"; wrong: {sorted(wrong)[:3]}" if wrong else "")
    equal, lost = correct == len(intact) == len(expected), IMAGES - survived
    yield Row("encode, hostile metadata of images", IMAGES, survived, lost, equal, seconds, note)

    began = time.monotonic()
    raw = setting.folder / "annotations"
    good, useless = hostile.write_annotations(raw, ANNOTATIONS, setting.seed)
    manifest = encoded(job, raw, "coco", "train2017")
    seconds = time.monotonic() - began
    ids, bad = latents(manifest).keys(), quarantined(manifest)
    survived = len(good & ids) + min(useless, len(bad))
    equal = ids == good and len(bad) == useless and all(bad.values())
    lost = ANNOTATIONS - survived
    yield Row("encode, hostile annotations", ANNOTATIONS, survived, lost, equal, seconds)


def write_images(folder: Path, seed: int) -> tuple[set[str], set[str]]:
    """Write two data sets, `hostile` and `clean`; returns the ids of intact and damaged images."""
    intact, damaged = set[str](), set[str]()
    for root in (folder / "hostile", folder / "clean"):
        root.mkdir()
        names = "".join(f"n{n:08d} number {n}\n" for n in range(CLASSES))
        (root / "LOC_synset_mapping.txt").write_text(names)
        for n in range(CLASSES):
            (root / "train" / f"n{n:08d}").mkdir(parents=True)
    for number, case in enumerate(hostile.images(IMAGES, seed)):
        wnid = f"n{number % CLASSES:08d}"
        place = f"train/{wnid}/{case.name}.JPEG"
        (folder / "hostile" / place).write_bytes(case.data)
        (intact if case.clean else damaged).add(f"imagenet/{place}")
        if case.clean:
            (folder / "clean" / place).write_bytes(case.clean)
    return intact, damaged


def encoded(job: Job, raw: Path, dataset: str, split: str) -> Manifest:
    """The manifest that the job writes; it must succeed, without a traceback."""
    job.raw, out = raw, str(raw.with_name(f"{raw.name}-encoded"))
    flags = ("--dataset", dataset, "--split", split, "--max_bad_share", "1", "--encoders", "1")
    code, _, stderr = job.run(out, *flags)
    assert code == 0, error_line(stderr)
    assert "Traceback" not in stderr, stderr
    manifest = Manifest.load(out)
    assert all(not v.problems for v in verify(manifest))
    return manifest


def latents(manifest: Manifest) -> dict[str, np.ndarray]:
    """The latents of every sample, by sample id."""
    store = open_store(manifest.location)
    by_id: dict[str, np.ndarray] = {}
    for shard in manifest.shards:
        data = store.get(shard.key)
        for batch in shard.batches:
            rows = RecordBatch(data[batch.offset : batch.offset + batch.length], manifest.schema)
            assert rows.latents is not None
            by_id |= dict(zip(rows.ids, np.asarray(rows.latents), strict=True))
    return by_id


def quarantined(manifest: Manifest) -> dict[str, str]:
    """The reason for each quarantined record, by id; each must have a reason and an origin."""
    assert all(q.reason and q.origin for q in manifest.quarantine)
    return {q.id: q.reason for q in manifest.quarantine}
