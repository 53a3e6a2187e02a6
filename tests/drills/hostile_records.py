"""Drill of hostile records: 2,000 of them through the real encode job."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mdm.data.manifest import Manifest
from mdm.data.schema import Rows
from mdm.preprocess.verify import verify
from mdm.storage import open_store
from tests import hostile
from tests.chaos.encode_job import Job, one_line
from tests.drills.drill import Row, Setting

IMAGES, ANNOTATIONS = 1500, 500
CLASSES = 4


def hostile_records(setting: Setting) -> Iterator[Row]:
    """Odd metadata beside sound and damaged pixels, odd types and encodings in annotations.

    Sound images must give the latents of clean copies of their pixels, bit for bit.
    """
    job = Job(setting.folder / "job")
    began = time.monotonic()
    sound, damaged = write_images(setting.folder, setting.seed)
    found = encoded(job, setting.folder / "hostile", "imagenet", "train")
    clean = encoded(job, setting.folder / "clean", "imagenet", "train")
    seconds = time.monotonic() - began
    expected, bad = latents(clean), quarantined(found)
    kept = latents(found)
    right = sum(np.array_equal(kept.get(key), expected[key]) for key in expected)
    held = right + len(damaged & bad.keys())
    wrong = (sound - kept.keys()) | (damaged & kept.keys())
    note = f"{len(damaged)} damaged" + (f"; wrong: {sorted(wrong)[:3]}" if wrong else "")
    equal = right == len(sound) == len(expected)
    yield Row(
        "encode, hostile metadata of images", IMAGES, held, IMAGES - held, equal, seconds, note
    )

    began = time.monotonic()
    raw = setting.folder / "annotations"
    good, useless = hostile.write_annotations(raw, ANNOTATIONS, setting.seed)
    found = encoded(job, raw, "coco", "train2017")
    seconds = time.monotonic() - began
    ids, bad = latents(found).keys(), quarantined(found)
    held = len(good & ids) + min(useless, len(bad))
    equal = ids == good and len(bad) == useless and all(bad.values())
    lost = ANNOTATIONS - held
    yield Row("encode, hostile annotations", ANNOTATIONS, held, lost, equal, seconds)


def write_images(folder: Path, seed: int) -> tuple[set[str], set[str]]:
    """Two sets, `hostile` and `clean`; the ids of sound and of damaged images."""
    sound, damaged = set[str](), set[str]()
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
        (sound if case.clean else damaged).add(f"imagenet/{place}")
        if case.clean:
            (folder / "clean" / place).write_bytes(case.clean)
    return sound, damaged


def encoded(job: Job, raw: Path, dataset: str, split: str) -> Manifest:
    """What the job makes of it; it must end well, without a word of a Traceback."""
    job.raw, out = raw, str(raw.with_name(f"{raw.name}-encoded"))
    more = ("--dataset", dataset, "--split", split, "--max_bad_share", "1", "--encoders", "1")
    code, _, stderr = job.run(out, *more)
    assert code == 0, one_line(stderr)
    assert "Traceback" not in stderr, stderr
    manifest = Manifest.load(out)
    assert all(not v.problems for v in verify(manifest))
    return manifest


def latents(manifest: Manifest) -> dict[str, np.ndarray]:
    """Of every example, by its id."""
    store = open_store(manifest.location)
    found: dict[str, np.ndarray] = {}
    for shard in manifest.shards:
        data = store.get(shard.key)
        for batch in shard.batches:
            rows = Rows(data[batch.offset : batch.offset + batch.length], manifest.schema)
            assert rows.latents is not None
            found |= dict(zip(rows.ids, np.asarray(rows.latents), strict=True))
    return found


def quarantined(manifest: Manifest) -> dict[str, str]:
    """Reasons by id; every record has one, and a file."""
    assert all(q.reason and q.origin for q in manifest.quarantine)
    return {q.id: q.reason for q in manifest.quarantine}
