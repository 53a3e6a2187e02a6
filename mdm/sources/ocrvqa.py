"""OCR-VQA: `dataset.json` and `images/<id><extension>`.

The published file is one object, id -> `{imageURL, questions [], answers [], split, title, …}`;
split 1 is for training, 2 for validation, 3 for testing. An image is saved under the entry's id
with the extension of its URL, or with that of another image format. A record is one question with
its answer as a dialogue; title, author and genre are ignored. Problems of an entry without a known
split are reported with the training split.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mdm.sources import jsonfile
from mdm.sources.annotated import Annotated, Content, Layout
from mdm.sources.fields import exchange, id_field, list_field, number_field
from mdm.sources.joined import Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

SOURCE = "ocrvqa"
SPLITS: tuple[str, ...] = ("train", "val", "test")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"


def _find(root: Path, split: str) -> Layout:
    annotations = locate(SOURCE, root, "dataset.json")
    return Layout(split, annotations, folders=("images",), archives=("images.zip",))


def _entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    try:
        key, book = id_field(element.name, "id"), jsonfile.entry(element)
        number = number_field(book.get("split"), "split")
        if not 1 <= number <= len(SPLITS):
            raise ValueError(f"field split is {number}, not 1, 2 or 3")
    except ValueError:
        if layout.split == SPLITS[0]:
            raise
        return
    if SPLITS[number - 1] != layout.split:
        return
    questions = list_field(book.get("questions"), "questions")
    answers = list_field(book.get("answers"), "answers")
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions, but {len(answers)} answers")
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        entry = {"question": question, "answer": answer, "imageURL": book.get("imageURL")}
        yield f"{key}/{i}", {**entry, "id": key}


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    stem, url = f"images/{entry['id']}", entry.get("imageURL")
    extension = ""
    if isinstance(url, str):
        extension = PurePosixPath(re.split(r"[?#]", url)[0]).suffix
    return Content(tuple(dict.fromkeys((stem + extension, stem))), turns=exchange(entry))


_reader = Annotated(SOURCE, SPLITS, _find, _entries, _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
