"""LLaVA-1.5's mixture: `llava_v1_5_mix665k.json` over the pictures of five other sets.

The published file is a list `[{id, image, conversations [{from, value}]}]`; `image` is a path below
`coco/train2017 gqa/images ocr_vqa/images textvqa/train_images vg/VG_100K vg/VG_100K_2`, and any of
these may still be in its zip (`coco/train2017.zip`, `vg/images2.zip` …). Split `train` holds the
dialogues about a picture, `train-text` those without one; none is published as held out. Replies
before the first question and a last question without a reply are left. A picture's own mark, the
line `<image>` at the beginning or end of a question, is taken out, for a record holds the picture
beside the dialogue; all other `<image>` are words. Ids in the file are not unique, so a record's id
is the file's and the byte where its entry begins.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources import jsonfile
from mdm.sources.annotated import Annotated, Content, Layout
from mdm.sources.fields import dialogue, id_field, list_field, text_field
from mdm.sources.joined import Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

SOURCE = "llava"
SPLITS: tuple[str, ...] = ("train", "train-text")
TRAINING: tuple[tuple[str, ...], ...] = (("train", "train-text"),)
HELD_OUT = ""
_FOLDERS = (
    "coco/train2017",
    "gqa/images",
    "ocr_vqa/images",
    "textvqa/train_images",
    "vg/VG_100K",
    "vg/VG_100K_2",
)
_ARCHIVES = (
    "coco/train2017.zip",
    "gqa/images.zip",
    "ocr_vqa/images.zip",
    "textvqa/train_val_images.zip",
    "vg/images.zip",
    "vg/images2.zip",
)
# Where a picture's mark stands in a question: a line at one end, or else beside the words there.
_MARKS = (
    re.compile(r"\A\s*<image>(?:[^\S\n]*\n)+"),
    re.compile(r"(?:\n[^\S\n]*)+<image>\s*\Z"),
    re.compile(r"\A\s*<image>[^\S\n]*"),
    re.compile(r"[^\S\n]*<image>\s*\Z"),
)


def _find(root: Path, split: str) -> Layout:
    found = locate(SOURCE, root, "llava_v1_5_mix665k.json")
    if split == "train-text":
        return Layout(split, found)
    return Layout(split, found, folders=_FOLDERS, archives=_ARCHIVES)


def _entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    try:
        entry = jsonfile.entry(element)
    except ValueError:
        if layout.split == SPLITS[0]:
            raise
        return  # told with the pictures' split, and only there
    if ("image" in entry) == (layout.split == SPLITS[0]):
        yield f"{id_field(entry.get('id'), 'id')}@{element.offset}", entry


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    turns = list_field(entry.get("conversations"), "conversations")
    if "image" in entry:
        turns = _without_mark(turns)
    said = dialogue(turns, "conversations", ("from", "value"), ("human", "gpt"))
    if "image" not in entry:
        return Content(turns=said)
    return Content((text_field(entry["image"], "image"),), turns=said)


def _without_mark(turns: list[Any]) -> list[Any]:
    """The turns without the one mark of the picture."""
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != "human":
            continue
        text = turn.get("value")
        if not isinstance(text, str):
            continue
        for mark in _MARKS:
            if at := mark.search(text):
                plain = text[: at.start()] + text[at.end() :]
                return [*turns[:i], {**turn, "value": plain}, *turns[i + 1 :]]
    return turns


_reader = Annotated(SOURCE, SPLITS, _find, _entries, _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
