"""Visual Genome: `question_answers.json`, `region_descriptions.json` and `VG_100K{,_2}/`.

The published files are lists with one element per image: `{id, qas [{qa_id, image_id, question,
answer, …}]}` and `{id, regions [{region_id, image_id, phrase, x, y, width, height}]}`, loose or in
`<file>.zip`; images `<image_id>.jpg` are in `VG_100K/` and `VG_100K_2/`, or still in `images.zip`
and `images2.zip`. In split `qa`, a record is one question with its answer as a dialogue. In split
`regions`, it is one phrase as the text of the whole image, since a record has no box. No split is
published as held out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.sources.annotated import Annotated, Content, Layout, nested
from mdm.sources.fields import exchange, id_field, text_field
from mdm.sources.joined import Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

SOURCE = "visual_genome"
SPLITS: tuple[str, ...] = ("qa", "regions")
TRAINING: tuple[tuple[str, ...], ...] = (("qa", "regions"),)
HELD_OUT = ""
_FOLDERS = ("VG_100K", "VG_100K_2")


def _find(root: Path, split: str) -> Layout:
    name = "question_answers.json" if split == "qa" else "region_descriptions.json"
    annotations = locate(SOURCE, root, name, f"{name}.zip::{name}")
    return Layout(split, annotations, folders=_FOLDERS, archives=("images.zip", "images2.zip"))


def _entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    if layout.split == "qa":
        return nested(element, "qas", "qa_id")
    return nested(element, "regions", "region_id")


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    image_id = id_field(entry.get("image_id"), "image_id")
    names = tuple(f"{folder}/{image_id}.jpg" for folder in _FOLDERS)
    if layout.split == "qa":
        return Content(names, turns=exchange(entry))
    return Content(names, text=text_field(entry.get("phrase"), "phrase"))


_reader = Annotated(SOURCE, SPLITS, _find, _entries, _content)
units, read, texts = _reader.units, _reader.read, _reader.texts
