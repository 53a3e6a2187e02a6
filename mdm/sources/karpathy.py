"""Karpathy's splits of COCO and Flickr30k: one object with a list `images`.

`images [{filename, filepath?, split, imgid, sentids, sentences [{raw, tokens, imgid, sentid}]}]`,
as `dataset_<name>.json` or still in `caption_datasets.zip`. Training joins `train` and `restval`. A
record is one sentence, with its `sentid` as the id and `raw` as the text. Problems of an entry
without a known split are reported with the training split.
"""

from collections.abc import Iterator
from typing import Any

from mdm.sources import jsonfile
from mdm.sources.annotated import Layout, nested
from mdm.sources.fields import text_field
from mdm.sources.jsonfile import Element

_PARTS = {
    "karpathy-train": ("train", "restval"),
    "karpathy-val": ("val",),
    "karpathy-test": ("test",),
}
SPLITS: tuple[str, ...] = tuple(_PARTS)


def files(name: str) -> tuple[str, ...]:
    """Where the file may be."""
    return name, f"annotations/{name}", f"caption_datasets.zip::{name}"


def entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    """The sentences of an image of this split, each with the image's own fields."""
    training = layout.split == SPLITS[0]
    try:
        image = jsonfile.entry(element)
        part = text_field(image.get("split"), "split")
        if not any(part in parts for parts in _PARTS.values()):
            raise ValueError(f"field split is {part[:80]!r}, not train, restval, val or test")
    except ValueError:
        if training:
            raise
        return
    if part not in _PARTS[layout.split]:
        return
    fields = {name: image.get(name) for name in ("filename", "filepath")}
    for key, sentence in nested(element, "sentences", "sentid"):
        yield key, sentence if isinstance(sentence, ValueError) else {**fields, **sentence}


def image_name(entry: dict[str, Any]) -> str:
    """The name of the image's file."""
    return text_field(entry.get("filename"), "filename")


def caption(entry: dict[str, Any]) -> str:
    """The sentence as it was written."""
    return text_field(entry.get("raw"), "raw")
