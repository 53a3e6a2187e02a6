"""Captions of images: COCO and Flickr30k, as published and in Karpathy's splits.

A record is one caption with its image.

Karpathy's file is one object with a list `images [{filename, filepath?, split, imgid, sentids,
sentences [{raw, tokens, imgid, sentid}]}]`, as `dataset_<name>.json` or still in
`caption_datasets.zip`. Training joins `train` and `restval`. A record's id is its sentence's
`sentid`. Problems of an entry without a known split are reported with the training split.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources import jsonfile
from mdm.sources.annotated import Annotated, Content, Layout, by_id, nested
from mdm.sources.fields import number_field, text_field
from mdm.sources.joined import Join, Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

# ---- Karpathy's splits

_KARPATHY = {
    "karpathy-train": ("train", "restval"),
    "karpathy-val": ("val",),
    "karpathy-test": ("test",),
}


def _karpathy_files(name: str) -> tuple[str, ...]:
    return name, f"annotations/{name}", f"caption_datasets.zip::{name}"


def _karpathy_entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    """The sentences of an image of this split, each with the image's own fields."""
    try:
        image = jsonfile.entry(element)
        part = text_field(image.get("split"), "split")
        if not any(part in parts for parts in _KARPATHY.values()):
            raise ValueError(f"field split is {part[:80]!r}, not train, restval, val or test")
    except ValueError:
        if layout.split == "karpathy-train":
            raise
        return
    if part not in _KARPATHY[layout.split]:
        return
    fields = {name: image.get(name) for name in ("filename", "filepath")}
    for key, sentence in nested(element, "sentences", "sentid"):
        yield key, sentence if isinstance(sentence, ValueError) else {**fields, **sentence}


# ---- COCO: `captions_{train,val}{2014,2017}.json` and the images of that edition.
#
# One object: `images [{id, file_name, …}]` and `annotations [{id, image_id, caption}]`, in
# `annotations/` or still in `annotations_trainval{2014,2017}.zip`; images are in `train2014/` … or
# `train2014.zip` …. Boxes, licences and URLs are ignored. `train` and `val` are short for the only
# edition present.


def _coco_files(split: str) -> tuple[str, ...]:
    """Where a split's annotations may be."""
    if split in _KARPATHY:
        return _karpathy_files("dataset_coco.json")
    name = f"captions_{split}.json"
    packed = f"annotations_trainval{split[-4:]}.zip"
    return f"annotations/{name}", name, f"{packed}::annotations/{name}"


def _coco_layout(root: Path, split: str) -> Layout:
    if split in ("train", "val"):
        split = _coco_edition(root, split)
    annotations = locate("coco", root, *_coco_files(split))
    editions: tuple[str, ...] = ("train2014", "val2014")
    join = None
    if split not in _KARPATHY:
        editions, join = (split,), Join(annotations, "images", "id", _coco_file_name)
    return Layout(
        split=split,
        annotations=annotations,
        section="annotations" if join else "images",
        folders=(*editions, *(f"images/{edition}" for edition in editions)),
        archives=tuple(f"{edition}.zip" for edition in editions),
        join=join,
    )


def _coco_edition(root: Path, split: str) -> str:
    present, missing = [], []
    for edition in (f"{split}2017", f"{split}2014", f"karpathy-{split}"):
        try:
            locate("coco", root, *_coco_files(edition))
            present.append(edition)
        except ValueError:
            missing.append(_coco_files(edition)[0])
    if len(present) > 1:
        raise ValueError(f"coco: {root} holds {' and '.join(present)}; choose one as the split")
    if not present:
        raise ValueError(f"coco: none of these files in {root}: {', '.join(missing)}")
    return present[0]


def _coco_file_name(image: dict[str, Any]) -> tuple[int, str]:
    return 0, text_field(image.get("file_name"), "file_name")


def _coco_entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    entries = by_id("id") if layout.join else _karpathy_entries
    return entries(element, layout)


def _coco_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    if joined:
        image_id = number_field(entry.get("image_id"), "image_id")
        (_, file), folder = joined.get(image_id, "image_id"), layout.split
        caption = text_field(entry.get("caption"), "caption")
    else:
        file = text_field(entry.get("filename"), "filename")
        folder = text_field(entry.get("filepath"), "filepath")
        caption = text_field(entry.get("raw"), "raw")
    return Content((f"{folder}/{file}", f"images/{folder}/{file}"), text=caption)


COCO = Annotated(
    SOURCE="coco",
    find=_coco_layout,
    entries=_coco_entries,
    content=_coco_content,
    SPLITS=("train", "val", "train2017", "val2017", "train2014", "val2014", *_KARPATHY),
)


# ---- Flickr30k: `results_20130124.token`, or Karpathy's splits, and `flickr30k-images/`.
#
# A line of the token file is `name.jpg#k<TAB>caption`. The file has no splits and is read as `all`,
# loose or from `flickr30k.tar.gz`. `train`, `val` and `test` come from `dataset_flickr30k.json`.
# Images are in `flickr30k-images/` (or `flickr30k_images/`), or still in
# `flickr30k-images.tar.gz`, which is read once, from start to end.

_TOKENS = "results_20130124.token"
_FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images")


def _flickr_layout(root: Path, split: str) -> Layout:
    archives = tuple(f"{folder}.tar.gz" for folder in _FLICKR_FOLDERS)
    if split == "all":
        annotations = locate("flickr30k", root, _TOKENS, f"flickr30k.tar.gz::{_TOKENS}")
        return Layout(split, annotations, lines=True, folders=_FLICKR_FOLDERS, archives=archives)
    try:
        annotations = locate("flickr30k", root, *_karpathy_files("dataset_flickr30k.json"))
    except ValueError as error:
        raise ValueError(f"{error}; without it, the split is all") from None
    split = f"karpathy-{split}"
    return Layout(split, annotations, "images", folders=_FLICKR_FOLDERS, archives=archives)


def _flickr_entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    if not layout.lines:
        yield from _karpathy_entries(element, layout)
        return
    if element.problem:
        raise ValueError(element.problem)
    name, tab, caption = element.value.partition("\t")
    name = name.strip()
    file, mark, number = name.rpartition("#")
    if not (tab and mark and file and number.isdecimal()):
        raise ValueError(f"line begins {name[:80]!r}, not <file>#<number> and a tab")
    yield name, {"filename": file, "raw": caption.strip()}


def _flickr_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    file = text_field(entry.get("filename"), "filename")
    caption = text_field(entry.get("raw"), "raw")
    return Content(tuple(f"{folder}/{file}" for folder in _FLICKR_FOLDERS), text=caption)


FLICKR30K = Annotated(
    SOURCE="flickr30k",
    find=_flickr_layout,
    entries=_flickr_entries,
    content=_flickr_content,
    SPLITS=("train", "val", "test", "all"),
    TRAINING=(("train",), ("all",)),
)
