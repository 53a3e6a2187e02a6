"""TextVQA: `TextVQA_0.5.1_{train,val}.json` and `train_images/<image_id>.jpg`.

The published file is one object with a list `data [{question, question_id, image_id, answers [10],
…}]`; the images of both splits are in `train_images/`, or still in `train_val_images.zip`. A record
is one question with the most frequent of its ten answers, as a dialogue. The test split has no
answers and is not read.
"""

from pathlib import Path
from typing import Any

from mdm.sources.annotated import Annotated, Content, Layout, by_id
from mdm.sources.fields import commonest, id_field, text_field
from mdm.sources.joined import Joined
from mdm.sources.packed import locate

SOURCE = "textvqa"
SPLITS: tuple[str, ...] = ("train", "val")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"


def _find(root: Path, split: str) -> Layout:
    annotations = locate(SOURCE, root, f"TextVQA_0.5.1_{split}.json")
    folders, archives = ("train_images",), ("train_val_images.zip",)
    return Layout(split, annotations, "data", folders=folders, archives=archives)


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    image_id = id_field(entry.get("image_id"), "image_id")
    question = text_field(entry.get("question"), "question")
    answer = commonest(entry.get("answers"), "answers")
    return Content((f"train_images/{image_id}.jpg",), turns=(question, answer))


_reader = Annotated(SOURCE, SPLITS, _find, by_id("question_id"), _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
