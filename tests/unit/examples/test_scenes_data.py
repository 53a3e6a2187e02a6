"""Scenes in published layouts: what is written, read back by the readers that encoding uses."""

import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from examples.published import MARKER
from examples.scenes import data, heldout
from examples.scenes import scene as module
from examples.scenes.bounds import answer_of, replies_of
from examples.scenes.data import Flags, captions, scenes, texts_rng
from examples.scenes.grammar import KINDS, is_right, parse
from examples.scenes.judge import locate
from examples.scenes.scene import (
    draw,
    draw_things,
    generator,
    held_out_colour,
    held_out_count,
    held_out_pair,
)
from mdm import sources
from mdm.sources.record import RawRecord

SIZES = {"journeydb": 60, "coco": 40, "llava": 30, "heldout": 20}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    flags = [f"--{name}={size}" for name, size in SIZES.items()]
    assert data.main(["--out", str(out), *flags]) == 0
    return out


def records(name: str, root: Path, split: str) -> list[RawRecord]:
    read = list(sources.records(name, root, split))
    assert all(isinstance(record, RawRecord) for record in read)
    return read


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(written, tmp_path):
    report = data.write(Flags(out=str(tmp_path), **SIZES))
    assert report == json.loads((written / MARKER).read_text())
    other = data.write(Flags(out=str(tmp_path), seed=1, **SIZES))
    for name, facts in other["sets"].items():
        same = facts["sha256"] == report["sets"][name]["sha256"]
        assert same == (name == "dialogues")


def test_a_scene_has_known_pixels():
    rng = generator(0, 0, 0, 1)
    pixels = draw(draw_things(rng, False), rng, 32, False).pixels
    # Of this version of the data; a change of it needs another VERSION.
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "17b5431bad6be020"


def test_the_readers_accept_every_layout(written):
    captioned = records("journeydb", written / "journeydb", "train")
    assert len(captioned) == SIZES["journeydb"]
    assert len(records("journeydb", written / "journeydb", "valid")) == SIZES["heldout"]
    assert len(records("coco", written / "coco", "train")) == 2 * SIZES["coco"]
    assert len(records("coco", written / "coco", "val")) == 2 * SIZES["heldout"]
    questions = records("vqav2", written / "coco", "train")
    assert len(questions) == 3 * SIZES["coco"]
    assert len(records("vqav2", written / "coco", "val")) == 3 * SIZES["heldout"]
    talks = records("llava", written / "llava", "train")
    assert len(talks) == SIZES["llava"]
    assert len(records("llava", written / "llava-val", "train")) == SIZES["heldout"]
    assert all(parse(record.text) for record in captioned)
    assert all(len(r.turns) == 2 and r.turns[0].startswith(KINDS) for r in questions)
    assert all(len(r.turns) == 6 for r in talks)
    image = Image.open(io.BytesIO(talks[0].image))
    assert image.size == (32, 32)


def test_images_of_records_show_their_scenes(written):
    flags = data.written_with(written)
    assert flags.coco == SIZES["coco"]
    drawn = dict(scenes(flags, "coco", False, SIZES["coco"]))
    for record in records("coco", written / "coco", "train"):
        number = int(record.origin.rpartition("_")[2].removesuffix(".jpg"))
        scene = drawn[number]
        assert is_right(record.text, scene.items)
        pixels = np.asarray(Image.open(io.BytesIO(record.image)), np.float32)
        assert np.abs(pixels - scene.pixels).mean() < 4  # JPEG


def test_captions_state_what_is_drawn():
    """The colours, places and number measured in the pixels are those of every caption."""
    flags = Flags()
    for held_out in (False, True):
        for i, scene in scenes(flags, "coco", held_out, 100):
            regions = locate(scene.pixels.astype(np.float32) / 255)
            for text in captions(scene, texts_rng(flags, "coco", held_out, i), 8):
                caption = parse(text)
                assert sum(thing.count for thing in caption.things) == len(regions)
                assert caption.holds(scene.items)
                wanted = [t.colour for t in caption.things for _ in range(t.count) if t.colour]
                if len(wanted) == len(regions):
                    assert sorted(wanted) == sorted(region.colour for region in regions)
                if caption.relation in ("left of", "right of"):
                    by_x = [r.colour for r in sorted(regions, key=lambda r: r.x)]
                    said = [t.colour for t in caption.things]
                    ordered = said if caption.relation == "left of" else said[::-1]
                    assert ordered in (by_x, ["", ""])


def test_held_out_combinations_never_occur_in_training(written):
    flags = Flags()
    counts = set()
    for name in data.SETS:
        for _, scene in scenes(flags, name, False, 400):
            digits = [item.digit for item in scene.items]
            assert not any(held_out_colour(i.digit, i.colour) for i in scene.items)
            assert not (len(set(digits)) == 2 and held_out_pair(*digits))
            assert not (len(set(digits)) == 1 and held_out_count(digits[0], len(digits)))
            counts.add(len(digits))
    assert counts == {1, 2, 3, 4}
    # No text names one either, in whatever layout.
    for name, folder in (("journeydb", "journeydb"), ("coco", "coco"), ("vqav2", "coco")):
        for record in records(name, written / folder, "train"):
            words = " ".join([record.text or "", *record.turns]).split()
            assert not [
                (a, b)
                for a, b in pairwise(words)
                if a in data.COLOURS and b.strip("?") in data.DIGITS
                if held_out_colour(data.DIGITS.index(b.strip("?")), a)
            ]


def test_training_shows_all_other_combinations():
    """50 of 60 coloured digits, 36 of 45 pairs and 24 of 30 counts; the rest is held out."""

    def combinations(held_out: bool) -> tuple[set, set, set]:
        colours, pairs, counts = set(), set(), set()
        for i in range(4000):
            things = draw_things(generator(0, 9, int(held_out), i), held_out).things
            colours |= {(t.digit, t.colour) for t in things}
            pairs |= {frozenset(t.digit for t in things)} if len(things) == 2 else set()
            counts |= {(t.digit, t.count) for t in things if t.count > 1}
        return colours, pairs, counts

    trained, held_out = combinations(False), combinations(True)
    assert [len(found) for found in trained] == [50, 36, 24]
    new = [held - known for held, known in zip(held_out, trained, strict=True)]
    assert [len(found) for found in new] == [10, 9, 6]
    assert (0, "red") in new[0]
    assert frozenset((2, 3)) in new[1]
    assert (3, 2) in new[2]


def test_held_out_scenes_have_one_held_out_combination_each():
    for _, scene in scenes(Flags(), "journeydb", True, 300):
        digits = [item.digit for item in scene.items]
        colour = any(held_out_colour(i.digit, i.colour) for i in scene.items)
        pair = len(set(digits)) == 2 and held_out_pair(*digits)
        count = len(set(digits)) == 1 and held_out_count(digits[0], len(digits))
        assert colour + pair + count == 1


def test_handwriting_of_held_out_scenes_is_not_in_training(monkeypatch):
    used = {False: set(), True: set()}
    plain = module._images()

    class Watched:
        def __init__(self, digit: int, held_out: bool) -> None:
            self.digit, self.held_out = digit, held_out

        def __len__(self) -> int:
            return len(plain[self.digit])

        def __getitem__(self, number: int) -> np.ndarray:
            used[self.held_out].add((self.digit, number))
            return plain[self.digit][number]

    for held_out in (False, True):
        watched = [Watched(digit, held_out) for digit in range(10)]
        monkeypatch.setattr(module, "_images", lambda watched=watched: watched)
        list(scenes(Flags(), "coco", held_out, 200))
    assert len(used[True]) > 100
    assert not used[True] & used[False]


def test_the_held_out_task_is_the_published_held_out_splits(written):
    first_stage = SimpleNamespace(encode=lambda pixels: pixels, decode=lambda latents: latents)
    task = heldout.setting(written, SimpleNamespace(), first_stage, prompts=4)
    asked = [(a.question.text, a.answer) for a in task.asked]
    assert asked == [r.turns for r in records("vqav2", written / "coco", "val")]
    published = [r.text for r in records("coco", written / "coco", "val")]
    assert list(task.captions) == published[:: data.CAPTIONS]
    for a in task.asked:
        assert answer_of(a.question.text, task.scenes[a.scene].items) == a.answer
    for turns, scene in zip(task.talks, task.scenes, strict=True):
        assert replies_of(turns, scene.items) == turns[1::2]
    yes_and_no = [r.turns[1] for r in records("vqav2", written / "coco", "train")]
    counts = {word: yes_and_no.count(word) for word in ("yes", "no")}
    assert task.majority.answers["is there"] == max(counts, key=counts.__getitem__)
    assert all(len(prompts) == 4 for prompts in task.prompts.values())
    real = {name: images.shape for name, images in task.real.items()}
    assert set(real.values()) == {(4, 3, 32, 32)}


def test_questions_are_answered_yes_and_no(written):
    answers = [r.turns[1] for r in records("vqav2", written / "coco", "train")]
    assert min(answers.count("yes"), answers.count("no")) >= 3
