"""GQA: `{train,val,testdev}_balanced_questions.json` and `images/<imageId>.jpg`.

The published file is one object, question id -> `{question, imageId, answer, fullAnswer, …}`, loose
or in `questions1.2.zip`; images may still be in `images.zip`. A record is one question with its
short answer as a dialogue; the full sentence, the program and the scene graph are ignored.
"""

from pathlib import Path
from typing import Any

from mdm.sources.annotated import Annotated, Content, Layout, by_name
from mdm.sources.fields import exchange, id_field
from mdm.sources.joined import Joined
from mdm.sources.packed import locate

SOURCE = "gqa"
SPLITS: tuple[str, ...] = ("train", "val", "testdev")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"


def _find(root: Path, split: str) -> Layout:
    name = f"{split}_balanced_questions.json"
    annotations = locate(SOURCE, root, name, f"questions/{name}", f"questions1.2.zip::{name}")
    return Layout(split, annotations, folders=("images",), archives=("images.zip",))


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    image_id = id_field(entry.get("imageId"), "imageId")
    return Content((f"images/{image_id}.jpg",), turns=exchange(entry))


_reader = Annotated(SOURCE, SPLITS, _find, by_name, _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
