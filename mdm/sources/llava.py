"""LLaVA-1.5's mixture: `llava_v1_5_mix665k.json` over the pictures of five other sets.

The published file is a list `[{id, image, conversations [{from, value}]}]`; `image` is a path below
`coco/train2017 gqa/images ocr_vqa/images textvqa/train_images vg/VG_100K vg/VG_100K_2`, and any of
these may still be in its zip (`coco/train2017.zip`, `vg/images2.zip` …). Split `train` holds the
dialogues about a picture, `train-text` those without one; none is published as held out. The mark
`<image>` is taken out of the questions: a record holds the picture beside them. Ids in the file are
not unique, so a record's id is the file's and the byte where its entry begins.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources import jsonfile
from mdm.sources.annotated import Annotated, Content, Layout
from mdm.sources.fields import id_field, list_field, object_field, text_field
from mdm.sources.joined import Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

SOURCE = "llava"
SPLITS: tuple[str, ...] = ("train", "train-text")
TRAINING = (("train", "train-text"),)
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
_ROLES = ("human", "gpt")


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
    turns = []
    for i, turn in enumerate(list_field(entry.get("conversations"), "conversations")):
        where = f"conversations[{i}]"
        turn = object_field(turn, where)
        role = text_field(turn.get("from"), f"{where}.from")
        if role != _ROLES[i % 2]:
            raise ValueError(f"field {where}.from is {role[:80]!r}, not {_ROLES[i % 2]!r}")
        value = text_field(turn.get("value"), f"{where}.value")
        turns.append(text_field(value.replace("<image>", "").strip(), f"{where}.value"))
    if not turns:
        raise ValueError("empty dialogue")
    if len(turns) % 2:
        raise ValueError(f"dialogue of {len(turns)} turns: the last question has no reply")
    if "image" not in entry:
        return Content(turns=tuple(turns))
    return Content((text_field(entry["image"], "image"),), turns=tuple(turns))


_reader = Annotated(SOURCE, SPLITS, _find, _entries, _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
