"""COCO captions: `captions_{train,val}{2014,2017}.json` and the images of that edition.

The published file is one object: `images [{id, file_name, …}]` and `annotations [{id, image_id,
caption}]`, in `annotations/` or still in `annotations_trainval{2014,2017}.zip`; images are in
`train2014/` … or `train2014.zip` …. The Karpathy splits come from `dataset_coco.json`
(`karpathy.py`). A record is one caption with its image; boxes, licences and URLs are ignored.
`train` and `val` are short for the only edition present.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources import karpathy
from mdm.sources.annotated import Annotated, Content, Layout, by_id
from mdm.sources.fields import number_field, text_field
from mdm.sources.joined import Join, Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

SOURCE = "coco"
_EDITIONS = ("train2017", "val2017", "train2014", "val2014")
SPLITS: tuple[str, ...] = ("train", "val", *_EDITIONS, *karpathy.SPLITS)
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"


def _files(split: str) -> tuple[str, ...]:
    """Where a split's annotations may be."""
    if split in karpathy.SPLITS:
        return karpathy.files("dataset_coco.json")
    name = f"captions_{split}.json"
    packed = f"annotations_trainval{split[-4:]}.zip"
    return f"annotations/{name}", name, f"{packed}::annotations/{name}"


def _find(root: Path, split: str) -> Layout:
    if split in ("train", "val"):
        split = _edition(root, split)
    annotations = locate(SOURCE, root, *_files(split))
    editions = ("train2014", "val2014") if split in karpathy.SPLITS else (split,)
    join = None
    if split not in karpathy.SPLITS:
        join = Join(annotations, "images", "id", _file_name)
    return Layout(
        split=split,
        annotations=annotations,
        section="annotations" if join else "images",
        folders=(*editions, *(f"images/{edition}" for edition in editions)),
        archives=tuple(f"{edition}.zip" for edition in editions),
        join=join,
    )


def _edition(root: Path, split: str) -> str:
    present, missing = [], []
    for edition in (f"{split}2017", f"{split}2014", f"karpathy-{split}"):
        try:
            locate(SOURCE, root, *_files(edition))
            present.append(edition)
        except ValueError:
            missing.append(_files(edition)[0])
    if len(present) > 1:
        raise ValueError(f"{SOURCE}: {root} holds {' and '.join(present)}; choose one as the split")
    if not present:
        raise ValueError(f"{SOURCE}: none of these files in {root}: {', '.join(missing)}")
    return present[0]


def _file_name(image: dict[str, Any]) -> tuple[int, str]:
    return 0, text_field(image.get("file_name"), "file_name")


def _entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    if layout.split in karpathy.SPLITS:
        return karpathy.entries(element, layout)
    return by_id("id")(element, layout)


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    if layout.split in karpathy.SPLITS:
        file, folder = karpathy.image_name(entry), text_field(entry.get("filepath"), "filepath")
        caption = karpathy.caption(entry)
    else:
        image_id = number_field(entry.get("image_id"), "image_id")
        (_, file), folder = joined.get(image_id, "image_id"), layout.split
        caption = text_field(entry.get("caption"), "caption")
    return Content((f"{folder}/{file}", f"images/{folder}/{file}"), text=caption)


_reader = Annotated(SOURCE, SPLITS, _find, _entries, _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
