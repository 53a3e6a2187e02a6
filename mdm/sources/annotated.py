"""What data sets of annotations beside pictures have in common: units, pictures, reports.

Most published sets for captions and questions are one JSON file whose entries name pictures in a
folder or a zip. A data set's module says where its files lie (`Layout`) and what an entry holds
(`Content`); the rest is here. A unit is a run of entries of the annotation file, known by the byte
where it begins; its records come in the file's order, but those of one picture together. Where the
pictures are a gzipped tar, which cannot be entered in the middle, the set is one unit in the
archive's order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from mdm.sources import jsonfile
from mdm.sources.fields import id_field, list_field, object_field
from mdm.sources.joined import Join, Joined
from mdm.sources.jsoncursor import BrokenFileError
from mdm.sources.jsonfile import Element
from mdm.sources.packed import (
    PictureError,
    Pictures,
    listing,
    open_file,
    unpacked_size,
    without_extension,
)
from mdm.sources.record import (
    UNIT_BYTES,
    BadRecord,
    RawRecord,
    Unit,
    check_split,
    fingerprint,
    one_record,
)
from mdm.sources.streams import ARCHIVE_ERRORS, describe, tgz_members
from mdm.sources.textfile import NotUtf8Error

_TARS = (".tgz", ".tar.gz")
# Entries that are looked through for others about the same picture: some tens of megabytes.
_WINDOW = 1 << 16


@dataclass(frozen=True)
class Layout:
    """Where the files of a split lie, all below the data set's folder.

    `annotations` may be packed (`archive.zip::member`); its entries are the list `section` of the
    JSON object, or with "" the file's own list or object, or with `lines` its lines. `join` is what
    other entries add to them. Pictures lie in `folders` or `archives`, any of which will do; a
    layout with neither has none.
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
    """What an entry says: the names its picture may have, and a caption or a dialogue."""

    pictures: tuple[str, ...] = ()
    text: str | None = None
    turns: tuple[str, ...] = ()


# Where a split of the data set in this folder lies; ValueError names the files that are missing.
Find = Callable[[Path, str], Layout]
# The entries of one element of the file, each with its id: mostly the element alone. An entry
# whose id is no good comes as the ValueError that says so.
Entries = Callable[[Element, Layout], Iterator[tuple[str, Any]]]
# What one of them holds; ValueError says what is wrong with it.
Read = Callable[[Any, Layout, Joined], Content]


def by_id(field: str) -> Entries:
    """Each element is an entry, and `field` its id."""

    def entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
        entry = jsonfile.entry(element)
        yield id_field(entry.get(field), field), entry

    return entries


def by_name(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    """Each element is an entry, and its key in the file's object its id."""
    yield id_field(element.name, "id"), jsonfile.entry(element)


def nested(element: Element, field: str, key: str) -> Iterator[tuple[str, Any]]:
    """The entries in an element's list `field`, by their ids `key`."""
    for i, item in enumerate(list_field(jsonfile.entry(element).get(field), field)):
        where = f"{field}[{i}]"
        try:
            with one_record(where):
                found = object_field(item, where)
                name = id_field(found.get(key), f"{where}.{key}")
            yield name, found
        except ValueError as error:
            yield f"@{element.offset}/{i}", error


@dataclass(frozen=True)
class _Row:
    key: str
    offset: int
    content: Content
    problem: str = ""
    file: str = ""  # where that offset lies, if not in the annotations


@dataclass(frozen=True)
class Annotated:
    """The reader of a data set. Ids are `<source>/<split>/<entry's id>`.

    The origin of a record is `<annotation file>@<byte>, <picture>`.
    """

    SOURCE: str
    SPLITS: tuple[str, ...]
    find: Find
    entries: Entries
    content: Read

    def units(self, root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
        """Runs of entries with about `unit_bytes` of annotations and pictures.

        Raises ValueError where a file is missing or the annotations hold not one entry.
        """
        layout = self._layout(root, split)
        size = unpacked_size(root, layout.annotations)
        inputs, total = [(layout.annotations, size)], size
        if layout.join:
            inputs.append((layout.join.file, unpacked_size(root, layout.join.file)))
            self._check_encoding(root, layout.join.file)
        if layout.folders or layout.archives:
            digest, pictures = listing(self.SOURCE, root, layout.folders, layout.archives)
            inputs.append((digest, pictures))
            total += pictures
        parts = 1 if _tar(root, layout) else max(1, -(-total // unit_bytes))
        cuts = [*self._cuts(root, layout, size, parts), max(size, 1)]
        return [
            Unit(
                source=self.SOURCE,
                split=split,
                index=index,
                root=str(root),
                kind="entries",
                files=(layout.annotations,),
                fingerprint=fingerprint([*inputs, ("start", start), ("stop", stop)]),
                start=start,
                stop=stop,
            )
            for index, (start, stop) in enumerate(pairwise(cuts))
        ]

    def read(self, unit: Unit) -> Iterator[RawRecord | BadRecord]:
        """The unit's records, each with its picture's bytes."""
        root = Path(unit.root)
        try:
            layout = self._layout(root, unit.split)
        except ValueError as error:
            yield BadRecord(f"{self.SOURCE}/{unit.split}/", self.SOURCE, unit.split, "", str(error))
            return
        rows = self._unique(self._rows(root, layout, unit.start, unit.stop, unit.index == 0))
        if tar := _tar(root, layout):
            yield from self._from_tar(root, layout, tar, rows)
            return
        with Pictures(root, layout.archives) as pictures:
            for row in _by_picture(rows):
                place, data, problem = "", None, row.problem
                if not problem and row.content.pictures:
                    try:
                        with one_record(row.content.pictures[0]):
                            place, data = pictures.read(row.content.pictures)
                    except PictureError as error:
                        place, problem = error.place, str(error)
                    except ValueError as error:
                        problem = str(error)
                yield self._record(layout, row, place, data, problem)

    def texts(self, root: Path, split: str) -> Iterator[str]:
        """Captions and turns of all usable entries; no picture is needed."""
        layout = self._layout(root, split)
        for row in self._rows(root, layout, 0, unpacked_size(root, layout.annotations), False):
            if row.content.text is not None:
                yield row.content.text
            yield from row.content.turns

    def _layout(self, root: Path, split: str) -> Layout:
        check_split(self.SOURCE, split, self.SPLITS)
        return self.find(root, split)

    def _check_encoding(self, root: Path, name: str) -> None:
        """ValueError for UTF-16, which would cost every record; other damage is reported."""
        try:
            with open_file(root, name):
                pass
        except NotUtf8Error as error:
            raise ValueError(f"{self.SOURCE}: {root / name}: {describe(error)}") from None
        except OSError:
            return

    def _cuts(self, root: Path, layout: Layout, size: int, parts: int) -> list[int]:
        """Where units begin: 0, then the first entry in each further one of equal parts."""
        cuts: list[int] = []
        try:
            with open_file(root, layout.annotations) as file:
                for element in _elements(file, layout, 0, size):
                    if not cuts:
                        cuts.append(0)
                    elif element.problem:
                        continue  # where damage ends is seen from the whole entry before it
                    elif element.offset >= (cuts[-1] * parts // size + 1) * size / parts:
                        cuts.append(element.offset)
                    if parts == 1:
                        break
        except (BrokenFileError, *ARCHIVE_ERRORS) as error:
            if not cuts:
                reason = describe(error)
                raise ValueError(f"{self.SOURCE}: {root / layout.annotations}: {reason}") from None
            # the last unit's reader says so when it comes there
        if not cuts:
            raise ValueError(f"{self.SOURCE}: {root / layout.annotations} holds no entry")
        return cuts

    def _rows(
        self, root: Path, layout: Layout, start: int, stop: int, reporter: bool
    ) -> Iterator[_Row]:
        """What entries in [start, stop) hold; the reporter tells what belongs to no entry, too."""
        joined = Joined.load(root, layout.join)
        if reporter and layout.join:
            for offset, key, problem in joined.unclaimed(self._ids(root, layout)):
                yield _Row(key, offset, Content(), problem, layout.join.file)
        offset = start
        try:
            with open_file(root, layout.annotations) as file:
                for element in _elements(file, layout, start, stop):
                    offset = element.offset
                    yield from self._of_element(element, layout, joined)
        except (BrokenFileError, *ARCHIVE_ERRORS) as error:
            problem = f"unreadable annotations behind byte {offset}: {describe(error)}"
            yield _Row(f"@{offset}", offset, Content(), problem)

    def _of_element(self, element: Element, layout: Layout, joined: Joined) -> Iterator[_Row]:
        offset = element.offset
        place = f"{layout.annotations}@{offset}"
        try:
            with one_record(place):
                for key, value in self.entries(element, layout):
                    try:
                        if isinstance(value, ValueError):
                            raise value
                        with one_record(place):
                            content = self.content(value, layout, joined)
                        yield _Row(key, offset, content)
                    except ValueError as error:
                        yield _Row(key, offset, Content(), str(error))
        except ValueError as error:
            yield _Row(f"@{offset}", offset, Content(), str(error))

    def _ids(self, root: Path, layout: Layout) -> Iterator[str]:
        """Ids of all entries, as far as they can be read."""
        try:
            with open_file(root, layout.annotations) as file:
                for element in _elements(file, layout, 0, unpacked_size(root, layout.annotations)):
                    try:
                        with one_record(f"{layout.annotations}@{element.offset}"):
                            yield from (key for key, _ in self.entries(element, layout))
                    except ValueError:
                        continue  # reported where the entry is read
        except (BrokenFileError, *ARCHIVE_ERRORS):
            return  # likewise

    @staticmethod
    def _unique(rows: Iterator[_Row]) -> Iterator[_Row]:
        seen: set[str] = set()
        for row in rows:
            if row.key in seen and not row.problem:
                yield _Row(row.key, row.offset, row.content, "duplicate id")
            else:
                seen.add(row.key)
                yield row

    def _from_tar(
        self, root: Path, layout: Layout, tar: str, rows: Iterator[_Row]
    ) -> Iterator[RawRecord | BadRecord]:
        """Pictures as they come out of the archive; the texts of all wait for them in memory."""
        waiting: dict[str, list[_Row]] = {}  # by the first name, without its extension
        first: dict[str, str] = {}  # of the others
        for row in rows:
            if row.problem:
                yield self._record(layout, row, "", None, row.problem)
                continue
            name, *others = map(without_extension, row.content.pictures)
            waiting.setdefault(name, []).append(row)
            first.update(dict.fromkeys(others, name))
        damage = "not in the archive"
        try:
            for member in tgz_members(root / tar):
                name = without_extension(member.name)
                for row in waiting.pop(name, []) or waiting.pop(first.get(name, ""), []):
                    place = f"{tar}::{member.name}"
                    yield self._record(layout, row, place, member.data, member.problem)
        except ARCHIVE_ERRORS as error:
            damage = f"unreadable archive: {describe(error)}"
        for late in waiting.values():
            for row in late:
                missing = f"missing file: {row.content.pictures[0]}: {damage}"
                yield self._record(layout, row, "", None, missing)

    def _record(
        self, layout: Layout, row: _Row, place: str, data: bytes | None, problem: str
    ) -> RawRecord | BadRecord:
        key = f"{self.SOURCE}/{layout.split}/{row.key}"
        origin = f"{row.file or layout.annotations}@{row.offset}" + (f", {place}" if place else "")
        if problem:
            return BadRecord(key, self.SOURCE, layout.split, origin, problem)
        return RawRecord(
            id=key,
            source=self.SOURCE,
            split=layout.split,
            origin=origin,
            image=data,
            text=row.content.text,
            turns=row.content.turns,
        )


def _elements(file: Any, layout: Layout, start: int, stop: int) -> Iterator[Element]:
    if layout.lines:
        return jsonfile.line_elements(file, start, stop)
    return jsonfile.elements(file, layout.section, start, stop)


def _by_picture(rows: Iterator[_Row]) -> Iterator[_Row]:
    """The rows of a window picture by picture, so that each is read and decoded once."""
    while window := list(islice(rows, _WINDOW)):
        groups: dict[Any, list[_Row]] = {}
        for number, row in enumerate(window):
            groups.setdefault(row.content.pictures or number, []).append(row)
        for group in groups.values():
            yield from group


def _tar(root: Path, layout: Layout) -> str:
    """The gzipped tar that holds the pictures, where no folder does."""
    if any((root / folder).is_dir() for folder in layout.folders):
        return ""
    tars = [a for a in layout.archives if a.endswith(_TARS) and (root / a).is_file()]
    return tars[0] if tars else ""
