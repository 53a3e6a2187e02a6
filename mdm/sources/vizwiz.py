"""VizWiz VQA: `{train,val}.json` and the images of the split.

The published file is a list `[{image, question, answers [{answer, answer_confidence}], answer_type,
answerable}]`, in the data set's folder, in `Annotations/` or in `Annotations.zip`; images are in
`train/` … or `train.zip` …. A record is one image's question with its most frequent answer, as a
dialogue (for a question that cannot be answered, usually the word "unanswerable"); its id is the
image's name. The test split has no answers and is not read.
"""

from pathlib import Path
from typing import Any

from mdm.sources.annotated import Annotated, Content, Layout, by_id
from mdm.sources.fields import commonest, text_field
from mdm.sources.joined import Joined
from mdm.sources.packed import locate

SOURCE = "vizwiz"
SPLITS: tuple[str, ...] = ("train", "val")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"


def _find(root: Path, split: str) -> Layout:
    name, packed = f"{split}.json", "Annotations.zip"
    places = (name, f"Annotations/{name}", f"{packed}::{name}", f"{packed}::Annotations/{name}")
    annotations = locate(SOURCE, root, *places)
    return Layout(split, annotations, folders=(split,), archives=(f"{split}.zip",))


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    image = text_field(entry.get("image"), "image")
    question = text_field(entry.get("question"), "question")
    answer = commonest(entry.get("answers"), "answers", "answer")
    return Content((f"{layout.split}/{image}",), turns=(question, answer))


_reader = Annotated(SOURCE, SPLITS, _find, by_id("image"), _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
