"""Data sets of annotations with images in separate files: their units, images and reports.

Most published sets of captions and questions are one JSON file whose entries refer to images in a
folder or a zip. A data set's module defines where its files are (`Layout`) and what an entry holds
(`Content`); this module does everything else. A unit is a run of entries of the annotation file,
identified by the byte where it starts; its records come in the file's order, except that those of
one image come together. A gzipped tar cannot be entered in the middle, so a set whose images are in
one is a single unit, in the archive's order.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from mdm.sources import jsonfile, packed
from mdm.sources.fields import id_field, list_field, object_field
from mdm.sources.joined import Join, Joined, load_joined
from mdm.sources.jsoncursor import BrokenFileError
from mdm.sources.jsonfile import Element
from mdm.sources.record import (
    UNIT_BYTES,
    BadRecord,
    RawRecord,
    Unit,
    attempt,
    check_split,
    make_units,
    one_record,
)
from mdm.sources.streams import ARCHIVE_ERRORS, Member, describe, expect_utf8, tgz_members

_TARS = (".tgz", ".tar.gz")
# The number of entries that are searched for others about the same image: some tens of megabytes.
_SEARCHED_ENTRIES = 1 << 16
_READ_ERRORS = (BrokenFileError, *ARCHIVE_ERRORS)


@dataclass(frozen=True)
class Layout:
    """Where the files of a split are, all below the data set's folder.

    `annotations` may be packed (`archive.zip::member`). Its entries are the list `section` of the
    JSON object; with `section` "", the file's own list or object; with `lines`, its lines. `join`
    adds data from other entries to them. Images may be in any of `folders` or `archives`; a layout
    with neither has no images.
    """

    split: str  # as the data set names it
    annotations: str
    section: str = ""
    lines: bool = False
    folders: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    join: Join | None = None


@dataclass(frozen=True)
class Content:
    """What an entry holds: the possible names of its image, and a caption or a dialogue."""

    images: tuple[str, ...] = ()
    text: str | None = None
    turns: tuple[str, ...] = ()


# The entries of one element of the file, each with its id: usually the element itself. An entry
# with a bad id is replaced by the ValueError that describes it.
Entries = Callable[[Element, Layout], Iterator[tuple[str, Any]]]


def by_id(field: str) -> Entries:
    """Each element is an entry, with its id in `field`."""

    def entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
        entry = jsonfile.entry(element)
        yield id_field(entry.get(field), field), entry

    return entries


def by_name(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    """Each element is an entry, and its key in the file's object is its id."""
    yield id_field(element.name, "id"), jsonfile.entry(element)


def nested(element: Element, field: str, key: str) -> Iterator[tuple[str, Any]]:
    """The entries in an element's list `field`, with their ids in the field `key`."""

    def with_id(item: Any, where: str) -> tuple[str, Any]:
        entry = object_field(item, where)
        return id_field(entry.get(key), f"{where}.{key}"), entry

    for i, item in enumerate(list_field(jsonfile.entry(element).get(field), field)):
        result = attempt(f"{field}[{i}]", with_id, item, f"{field}[{i}]")
        yield (f"@{element.offset}/{i}", result) if isinstance(result, ValueError) else result


@dataclass(frozen=True)
class _Annotation:
    entry_id: str
    origin: str  # file@byte
    content: Content = Content()
    problem: str = ""


@dataclass
class Annotated:
    """The reader of a data set. Ids are `<source>/<split>/<entry's id>`.

    The origin of a record is `<annotation file>@<byte>, <image>`.
    """

    SOURCE: str
    # Where a split of the data set in this folder is; ValueError names the files that are missing.
    find: Callable[[Path, str], Layout]
    entries: Entries
    # What an entry holds; ValueError says what is wrong with it.
    content: Callable[[Any, Layout, Joined | None], Content]
    SPLITS: tuple[str, ...] = ("train", "val")
    TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
    HELD_OUT: str = "val"

    def units(self, root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
        """Runs of entries with about `unit_bytes` of annotations and images.

        Raises ValueError if a file is missing or the annotations hold no entry.
        """
        layout = self._layout(root, split)
        size = packed.unpacked_size(root, layout.annotations)
        inputs, total = [(layout.annotations, size)], size
        if layout.join:
            inputs.append((layout.join.file, packed.unpacked_size(root, layout.join.file)))
            with (
                expect_utf8(self.SOURCE, root / layout.join.file),
                packed.open_file(root, layout.join.file),
            ):
                pass
        if layout.folders or layout.archives:
            digest, image_bytes = packed.listing(self.SOURCE, root, layout.folders, layout.archives)
            inputs.append((digest, image_bytes))
            total += image_bytes
        count = 1 if _image_tar(root, layout) else max(1, -(-total // unit_bytes))
        parts = []
        for start, stop in pairwise([*self._unit_starts(root, layout, size, count), max(size, 1)]):
            fingerprinted = [*inputs, ("start", start), ("stop", stop)]
            parts.append(("entries", [layout.annotations], fingerprinted, start, stop))
        return make_units(self.SOURCE, split, root, parts)

    def read(self, unit: Unit) -> Iterator[RawRecord | BadRecord]:
        """The unit's records, each with its image's bytes."""
        root = Path(unit.root)
        try:
            layout = self._layout(root, unit.split)
        except ValueError as error:
            yield unit.bad_record(f"{self.SOURCE}/{unit.split}/", "", str(error))
            return
        annotations = self._annotations(root, layout, unit.start, unit.stop)
        if unit.index == 0:
            annotations = chain(self._unclaimed(root, layout), annotations)
        annotations = _unique(annotations)
        if tar := _image_tar(root, layout):
            yield from self._read_tar(root, layout, tar, annotations)
            return
        with packed.Images(root, layout.archives) as images:
            for annotation in _group_by_image(annotations):
                names, image = annotation.content.images, Member("", None)
                if names and not annotation.problem:
                    result = attempt(names[0], images.read, names)
                    if isinstance(result, ValueError):
                        result = Member("", None, str(result))
                    image = result
                yield self._record(layout, annotation, image)

    def texts(self, root: Path, split: str) -> Iterator[str]:
        """Captions and turns of all usable entries, without reading images."""
        for annotation in self._annotations(root, self._layout(root, split)):
            if annotation.content.text is not None:
                yield annotation.content.text
            yield from annotation.content.turns

    def _layout(self, root: Path, split: str) -> Layout:
        check_split(self.SOURCE, split, self.SPLITS)
        return self.find(root, split)

    def _unit_starts(self, root: Path, layout: Layout, size: int, count: int) -> list[int]:
        """Byte 0, then the first entry in each further one of `count` equal parts of the file."""
        starts: list[int] = []
        try:
            for element in _elements(root, layout):
                if not starts:
                    starts.append(0)
                elif element.problem:
                    continue  # the end of damage is found only from the valid entry before it
                elif element.offset >= (starts[-1] * count // size + 1) * size / count:
                    starts.append(element.offset)
                if count == 1:
                    break
        except _READ_ERRORS as error:
            if not starts:
                reason = describe(error)
                raise ValueError(f"{self.SOURCE}: {root / layout.annotations}: {reason}") from None
            # otherwise the reader of the last unit reports it
        if not starts:
            raise ValueError(f"{self.SOURCE}: {root / layout.annotations} holds no entry")
        return starts

    def _unclaimed(self, root: Path, layout: Layout) -> Iterator[_Annotation]:
        """The problems of the joined list that belong to no entry of the annotations."""
        if layout.join:
            joined = load_joined(root, layout.join)
            for offset, entry_id, problem in joined.unclaimed(self._ids(root, layout)):
                yield _Annotation(entry_id, f"{layout.join.file}@{offset}", problem=problem)

    def _annotations(
        self, root: Path, layout: Layout, start: int = 0, stop: int = sys.maxsize
    ) -> Iterator[_Annotation]:
        """What the entries hold that start in bytes [start, stop)."""
        joined = load_joined(root, layout.join) if layout.join else None
        offset = start
        try:
            for element in _elements(root, layout, start, stop):
                offset = element.offset
                yield from self._element_annotations(element, layout, joined)
        except _READ_ERRORS as error:
            problem = f"unreadable annotations after byte {offset}: {describe(error)}"
            yield _Annotation(f"@{offset}", f"{layout.annotations}@{offset}", problem=problem)

    def _element_annotations(
        self, element: Element, layout: Layout, joined: Joined | None
    ) -> Iterator[_Annotation]:
        origin = f"{layout.annotations}@{element.offset}"
        try:
            with one_record(origin):
                for entry_id, entry in self.entries(element, layout):
                    content = entry
                    if not isinstance(entry, ValueError):
                        content = attempt(origin, self.content, entry, layout, joined)
                    if isinstance(content, ValueError):
                        yield _Annotation(entry_id, origin, problem=str(content))
                    else:
                        yield _Annotation(entry_id, origin, content)
        except ValueError as error:
            yield _Annotation(f"@{element.offset}", origin, problem=str(error))

    def _ids(self, root: Path, layout: Layout) -> Iterator[str]:
        """The ids of all readable entries."""
        with suppress(*_READ_ERRORS):  # they are reported when the entries are read
            for element in _elements(root, layout):
                with suppress(ValueError), one_record(f"{layout.annotations}@{element.offset}"):
                    yield from (entry_id for entry_id, _ in self.entries(element, layout))

    def _read_tar(
        self, root: Path, layout: Layout, tar: str, annotations: Iterator[_Annotation]
    ) -> Iterator[RawRecord | BadRecord]:
        """Records in the order of the archive's images, with all annotations held in memory."""
        waiting: dict[str, list[_Annotation]] = {}  # by the first image name, without extension
        first_names: dict[str, str] = {}  # of the other image names
        for annotation in annotations:
            if annotation.problem:
                yield self._record(layout, annotation, Member("", None))
                continue
            name, *others = map(packed.without_extension, annotation.content.images)
            waiting.setdefault(name, []).append(annotation)
            first_names.update(dict.fromkeys(others, name))
        damage = "not in the archive"
        try:
            for member in tgz_members(root / tar):
                name = packed.without_extension(member.name)
                matches = waiting.pop(name, []) or waiting.pop(first_names.get(name, ""), [])
                image = replace(member, name=f"{tar}::{member.name}")
                yield from (self._record(layout, annotation, image) for annotation in matches)
        except ARCHIVE_ERRORS as error:
            damage = f"unreadable archive: {describe(error)}"
        for annotation in chain.from_iterable(waiting.values()):
            problem = f"missing file: {annotation.content.images[0]}: {damage}"
            yield self._record(layout, annotation, Member("", None, problem))

    def _record(
        self, layout: Layout, annotation: _Annotation, image: Member
    ) -> RawRecord | BadRecord:
        origin = ", ".join(filter(None, (annotation.origin, image.name)))
        record_id = f"{self.SOURCE}/{layout.split}/{annotation.entry_id}"
        if problem := annotation.problem or image.problem:
            return BadRecord(record_id, self.SOURCE, layout.split, origin, problem)
        text, turns = annotation.content.text, annotation.content.turns
        return RawRecord(record_id, self.SOURCE, layout.split, origin, image.data, text, turns)


def _elements(
    root: Path, layout: Layout, start: int = 0, stop: int = sys.maxsize
) -> Iterator[Element]:
    """The elements of the annotations that start in bytes [start, stop)."""
    with packed.open_file(root, layout.annotations) as file:
        if layout.lines:
            yield from jsonfile.line_elements(file, start, stop)
        else:
            yield from jsonfile.elements(file, layout.section, start, stop)


def _unique(annotations: Iterator[_Annotation]) -> Iterator[_Annotation]:
    """The annotations, with a problem added where an id repeats."""
    seen: set[str] = set()
    for annotation in annotations:
        if annotation.entry_id in seen and not annotation.problem:
            yield replace(annotation, problem="duplicate id")
        else:
            seen.add(annotation.entry_id)
            yield annotation


def _group_by_image(annotations: Iterator[_Annotation]) -> Iterator[_Annotation]:
    """The annotations, reordered image by image so that each image is read and decoded once."""
    while searched := list(islice(annotations, _SEARCHED_ENTRIES)):
        by_image: dict[Any, list[_Annotation]] = {}
        for number, annotation in enumerate(searched):
            by_image.setdefault(annotation.content.images or number, []).append(annotation)
        yield from chain.from_iterable(by_image.values())


def _image_tar(root: Path, layout: Layout) -> str:
    """The gzipped tar that holds the images, or "" if they are in folders or zips."""
    if any((root / folder).is_dir() for folder in layout.folders):
        return ""
    tars = [a for a in layout.archives if a.endswith(_TARS) and (root / a).is_file()]
    return tars[0] if tars else ""
