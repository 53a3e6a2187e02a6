"""JourneyDB: an annotation file of JSON lines and archives of pictures, each a gzipped tar.

Layout: `data/train/train_anno_realease_repath.jsonl.tgz` (so spelled) beside
`data/train/imgs/000.tgz` ..., `data/valid/valid_anno_repath.jsonl.tgz` beside `data/valid/imgs/`,
and `data/test/test_questions.jsonl.tgz` beside `data/test/imgs.tgz`, one archive. Archives may be
extracted (`imgs/000/`; of the test split, `imgs/`), and may lie beside the annotations. A row holds
`img_path` ("./000/<uuid>.jpg", with any folders before the archive's), `prompt`, and often
`Task2.Caption`; one without both is a bad record. The annotations outgrow memory, so a unit (one
archive) streams them and keeps its own rows. What belongs to no archive is reported once, by the
first unit.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mdm.sources.fields import text_field
from mdm.sources.record import (
    UNIT_BYTES,
    BadRecord,
    RawRecord,
    Unit,
    check_split,
    fingerprint,
    one_record,
)
from mdm.sources.streams import (
    ARCHIVE_ERRORS,
    Member,
    describe,
    parse_row,
    read_file,
    tgz_lines,
    tgz_members,
)
from mdm.sources.textfile import NotUtf8Error, is_blank, is_clutter

SOURCE = "journeydb"
SPLITS: tuple[str, ...] = ("train", "valid", "test")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "valid"
ANNOTATIONS = {
    "train": "data/train/train_anno_realease_repath.jsonl.tgz",
    "valid": "data/valid/valid_anno_repath.jsonl.tgz",
    "test": "data/test/test_questions.jsonl.tgz",
}
_TGZ = ".tgz"
_ONE_ARCHIVE = "imgs"  # of a split whose pictures lie in no archives of their own


def units(root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """One unit an archive of pictures (`unit_bytes` cannot split a gzip stream and is not used).

    Raises ValueError where the annotations or the archives are missing, or the former are UTF-16.
    """
    check_split(SOURCE, split, SPLITS)
    annotations = root / ANNOTATIONS[split]
    if not annotations.is_file():
        raise ValueError(f"{SOURCE}: no annotations {ANNOTATIONS[split]} in {root}")
    try:
        next(tgz_lines(annotations), None)
    except NotUtf8Error as error:
        raise ValueError(f"{SOURCE}: {annotations}: {describe(error)}") from None
    except ARCHIVE_ERRORS:
        pass  # the reader says so
    archives = _archives(root, split)
    if not archives:
        raise ValueError(f"{SOURCE}: no data/{split}/imgs/*.tgz in {root}, nor their folders")
    head = (ANNOTATIONS[split], annotations.stat().st_size)
    found: list[Unit] = []
    for name, path in archives.items():
        packed = path.is_file()
        files = [path] if packed else _files(path)
        listed = [(file.relative_to(root).as_posix(), _size(file)) for file in files]
        found.append(
            Unit(
                source=SOURCE,
                split=split,
                index=len(found),
                root=str(root),
                kind=f"{'archive' if packed else 'folder'} {name}",
                files=tuple(file for file, _ in listed),
                fingerprint=fingerprint([head, *listed]),
            )
        )
    return found


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The archive's annotated pictures, in the archive's order.

    Ids are `journeydb/<split>/<archive>/<file>`. A picture without a row and a row without a
    picture are both bad records.
    """
    archive = _name(unit)
    rows: dict[str, str | None] = {}  # None: already reported as bad
    yield from _collect(unit, archive, rows)

    def key(name: str) -> str:
        return f"{SOURCE}/{unit.split}/{archive}/{name}"

    def bad(name: str, reason: str) -> BadRecord:
        return BadRecord(key(name), SOURCE, unit.split, _place(unit, name), reason)

    done: set[str] = set()
    damage = ""
    try:
        for member in _members(unit):
            name = PurePosixPath(member.name).name
            if name in done:
                yield bad(name, "duplicate id: the archive holds this name twice")
                continue
            done.add(name)
            reported = name in rows and rows[name] is None
            text = rows.pop(name, None)
            if reported:
                continue
            if member.data is None:
                yield bad(name, member.problem)
            elif text is None:
                yield bad(name, "picture without annotation")
            else:
                yield RawRecord(
                    id=key(name),
                    source=SOURCE,
                    split=unit.split,
                    origin=_place(unit, member.name),
                    image=member.data,
                    text=text,
                )
    except ARCHIVE_ERRORS as error:
        damage = f"unreadable archive after {len(done)} pictures: {describe(error)}"
        yield BadRecord(key(""), SOURCE, unit.split, unit.files[0], damage)
    for name in (name for name, text in rows.items() if text is not None):
        yield bad(name, f"missing file: {damage or 'annotated, but not in the archive'}")


def _name(unit: Unit) -> str:
    """The archive's name, or that of the folder extracted from it."""
    return unit.kind.partition(" ")[2]


def _place(unit: Unit, name: str) -> str:
    """Where a picture lies, for people; `name` may have folders before it."""
    if unit.kind.startswith("archive"):
        return f"{unit.files[0]}::{name}"
    return name if name in unit.files else f"{PurePosixPath(unit.files[0]).parent}/{name}"


def _members(unit: Unit) -> Iterator[Member]:
    if unit.kind.startswith("archive"):
        yield from tgz_members(Path(unit.root) / unit.files[0])
        return
    for file in unit.files:
        try:
            yield Member(file, read_file(Path(unit.root) / file))
        except ValueError as error:
            yield Member(file, None, str(error))


def texts(root: Path, split: str) -> Iterator[str]:
    """Every usable caption, from the annotations alone."""
    first = units(root, split)[0]
    try:
        for _, _, line in tgz_lines(Path(first.root) / ANNOTATIONS[split]):
            try:
                with one_record():
                    text = _text(parse_row(line))
                yield text
            except ValueError:
                continue  # the readers report it; here only usable text counts
    except ARCHIVE_ERRORS:
        return  # likewise


def _archives(root: Path, split: str) -> dict[str, Path]:
    """Archives by name, or where there is none of the name, the folder extracted from it."""
    folder = root / "data" / split
    found: dict[str, Path] = {}
    there = [path for place in (folder / "imgs", folder) for path in place.glob("*")]
    there = [path for path in there if not is_clutter(path.name)]
    for path in there:
        if path.suffix == _TGZ and not path.stem.endswith(".jsonl") and path.is_file():
            found.setdefault(path.stem, path)
    for path in there:
        if path.is_dir() and any(_files(path)):
            found.setdefault(path.name, path)
    single = found.pop(_ONE_ARCHIVE, None)
    if not found and single:
        return {_ONE_ARCHIVE: single}
    return dict(sorted(found.items(), key=lambda item: item[0] + _TGZ))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, in order."""
    for here, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not is_clutter(name))
        yield from (Path(here, name) for name in sorted(names) if not is_clutter(name))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0  # a link may lead nowhere


def _collect(unit: Unit, archive: str, rows: dict[str, str | None]) -> Iterator[BadRecord]:
    """Fill `rows` with file name -> text of this archive, and yield what is wrong."""
    reporter = unit.index == 0
    present = _archives(Path(unit.root), unit.split) if reporter else {}
    elsewhere: Counter[str] = Counter()
    for number, row in _annotations(unit, archive):
        if isinstance(row, str):
            yield _bad_row(unit, f"line {number}", number, row)
            continue
        folder, file = _path(row, archive == _ONE_ARCHIVE)
        if reporter and folder not in present:
            elsewhere[folder] += 1
        if folder != archive:
            continue
        if file in rows:
            reason = "duplicate id: a second row for this picture"
            yield _bad_row(unit, f"{folder}/{file}", number, reason)
            continue
        try:
            with one_record(f"{ANNOTATIONS[unit.split]}:{number}"):
                rows[file] = _text(row)
        except ValueError as error:
            rows[file] = None
            yield _bad_row(unit, f"{folder}/{file}", number, str(error))
    for folder, count in sorted(elsewhere.items()):
        reason = f"missing file: no archive {folder}.tgz for its {count} annotated pictures"
        yield _bad_row(unit, f"{folder}/", 0, reason)


def _annotations(unit: Unit, archive: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, row with a good path). The first unit sees all rows, and reasons as text.

    The other units pass over what cannot be theirs, unparsed, and leave reports to the first.
    """
    reporter = unit.index == 0
    needle = archive.encode()
    number = 0
    try:
        for _, number, line in tgz_lines(Path(unit.root) / ANNOTATIONS[unit.split]):
            if is_blank(line) or not (reporter or needle in line):
                continue
            try:
                with one_record(f"{ANNOTATIONS[unit.split]}:{number}"):
                    row = parse_row(line)
                    _path(row, archive == _ONE_ARCHIVE)
                yield number, row
            except ValueError as error:
                if reporter:
                    yield number, str(error)
    except ARCHIVE_ERRORS as error:
        if reporter:
            yield number, f"unreadable annotations after line {number}: {describe(error)}"


def _bad_row(unit: Unit, name: str, number: int, reason: str) -> BadRecord:
    key = f"{SOURCE}/{unit.split}/{name}"
    return BadRecord(key, SOURCE, unit.split, f"{ANNOTATIONS[unit.split]}:{number}", reason)


def _path(row: dict[str, Any], single: bool) -> tuple[str, str]:
    """(archive, file), whatever folders stand before; of a `single` archive, the file alone."""
    path = text_field(row.get("img_path"), "img_path")
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if ".." in parts or len(parts) < (1 if single else 2):
        raise ValueError(f"field img_path is {path[:80]!r}, not ./<archive>/<file>")
    return _ONE_ARCHIVE if single else parts[-2], parts[-1]


def _text(row: dict[str, Any]) -> str:
    """The caption where there is one, else the prompt that made the picture."""
    task = row.get("Task2")
    if task is not None and not isinstance(task, dict):
        raise ValueError("field Task2 is not an object")
    if task and task.get("Caption") is not None:
        return text_field(task["Caption"], "Task2.Caption")
    return text_field(row.get("prompt"), "prompt")
