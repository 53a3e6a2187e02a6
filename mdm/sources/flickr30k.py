"""Flickr30k: `results_20130124.token`, or Karpathy's splits, and `flickr30k-images/`.

A line of the token file is `name.jpg#k<TAB>caption`. The file has no splits and is read as `all`,
loose or from `flickr30k.tar.gz`. `train`, `val` and `test` come from `dataset_flickr30k.json`
(`karpathy.py`). Images are in `flickr30k-images/` (or `flickr30k_images/`), or still in
`flickr30k-images.tar.gz`, which is read once, from start to end. A record is one caption.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources import karpathy
from mdm.sources.annotated import Annotated, Content, Layout
from mdm.sources.fields import text_field
from mdm.sources.joined import Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

SOURCE = "flickr30k"
SPLITS: tuple[str, ...] = ("train", "val", "test", "all")
TRAINING: tuple[tuple[str, ...], ...] = (("train",), ("all",))
HELD_OUT = "val"
_TOKENS = "results_20130124.token"
_FOLDERS = ("flickr30k-images", "flickr30k_images")


def _find(root: Path, split: str) -> Layout:
    archives = tuple(f"{folder}.tar.gz" for folder in _FOLDERS)
    if split == "all":
        annotations = locate(SOURCE, root, _TOKENS, f"flickr30k.tar.gz::{_TOKENS}")
        return Layout(split, annotations, lines=True, folders=_FOLDERS, archives=archives)
    try:
        annotations = locate(SOURCE, root, *karpathy.files("dataset_flickr30k.json"))
    except ValueError as error:
        raise ValueError(f"{error}; without it, the split is all") from None
    return Layout(f"karpathy-{split}", annotations, "images", folders=_FOLDERS, archives=archives)


def _entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    if not layout.lines:
        yield from karpathy.entries(element, layout)
        return
    if element.problem:
        raise ValueError(element.problem)
    name, tab, caption = element.value.partition("\t")
    name = name.strip()
    file, mark, number = name.rpartition("#")
    if not (tab and mark and file and number.isdecimal()):
        raise ValueError(f"line begins {name[:80]!r}, not <file>#<number> and a tab")
    yield name, {"filename": file, "raw": caption.strip()}


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    file = text_field(karpathy.image_name(entry), "filename")
    return Content(tuple(f"{folder}/{file}" for folder in _FOLDERS), text=karpathy.caption(entry))


_reader = Annotated(SOURCE, SPLITS, _find, _entries, _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
