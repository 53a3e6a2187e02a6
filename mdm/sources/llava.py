"""LLaVA-1.5's mixture: `llava_v1_5_mix665k.json` and the images of five other sets.

The published file is a list `[{id, image, conversations [{from, value}]}]`; `image` is a path below
`coco/train2017 gqa/images ocr_vqa/images textvqa/train_images vg/VG_100K vg/VG_100K_2`, and any of
these may still be in its zip (`coco/train2017.zip`, `vg/images2.zip` …). Split `train` holds the
dialogues about an image, `train-text` those without one; none is published as held out. Replies
before the first question and a last question without a reply are dropped. The placeholder of the
image, the line `<image>` at the start or end of a question, is removed, because a record holds the
image separately; any other `<image>` is ordinary text. Ids in the file are not unique, so a
record's id consists of the published id and the byte where its entry starts.
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

_ARCHIVES = {  # by the folder that it holds
    "coco/train2017": "coco/train2017.zip",
    "gqa/images": "gqa/images.zip",
    "ocr_vqa/images": "ocr_vqa/images.zip",
    "textvqa/train_images": "textvqa/train_val_images.zip",
    "vg/VG_100K": "vg/images.zip",
    "vg/VG_100K_2": "vg/images2.zip",
}
# The image's placeholder in a question: a line of its own at either end, or else next to text.
_PLACEHOLDERS = (
    re.compile(r"\A\s*<image>(?:[^\S\n]*\n)+"),
    re.compile(r"(?:\n[^\S\n]*)+<image>\s*\Z"),
    re.compile(r"\A\s*<image>[^\S\n]*"),
    re.compile(r"[^\S\n]*<image>\s*\Z"),
)


def _layout(root: Path, split: str) -> Layout:
    annotations = locate("llava", root, "llava_v1_5_mix665k.json")
    if split == "train-text":
        return Layout(split, annotations)
    folders, archives = tuple(_ARCHIVES), tuple(_ARCHIVES.values())
    return Layout(split, annotations, folders=folders, archives=archives)


def _entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    try:
        entry = jsonfile.entry(element)
    except ValueError:
        if layout.split == "train":
            raise
        return  # reported only with the split that has images
    if ("image" in entry) == (layout.split == "train"):
        yield f"{id_field(entry.get('id'), 'id')}@{element.offset}", entry


def _content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    turns = list_field(entry.get("conversations"), "conversations")
    if "image" in entry:
        turns = _remove_placeholder(turns)
    texts = dialogue(turns, "conversations", ("from", "value"), ("human", "gpt"))
    if "image" not in entry:
        return Content(turns=texts)
    return Content((text_field(entry["image"], "image"),), turns=texts)


def _remove_placeholder(turns: list[Any]) -> list[Any]:
    """The turns without the first placeholder of the image."""
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != "human":
            continue
        text = turn.get("value")
        if not isinstance(text, str):
            continue
        for placeholder in _PLACEHOLDERS:
            if match := placeholder.search(text):
                plain = text[: match.start()] + text[match.end() :]
                return [*turns[:i], {**turn, "value": plain}, *turns[i + 1 :]]
    return turns


LLAVA = Annotated(
    SOURCE="llava",
    find=_layout,
    entries=_entries,
    content=_content,
    SPLITS=("train", "train-text"),
    TRAINING=(("train", "train-text"),),
    HELD_OUT="",
)
