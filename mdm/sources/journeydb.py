"""JourneyDB: an annotation file of JSON lines and archives of images, each a gzipped tar.

Layout: `data/train/train_anno_realease_repath.jsonl.tgz` (sic) with `data/train/imgs/000.tgz` ...,
`data/valid/valid_anno_repath.jsonl.tgz` with `data/valid/imgs/`, and
`data/test/test_questions.jsonl.tgz` with a single archive, `data/test/imgs.tgz`. Archives may be
extracted (`imgs/000/`; for the test split, `imgs/`), and may be in the folder of the annotations.
An annotation holds `img_path` ("./000/<uuid>.jpg", with any folders before the archive's), `prompt`
and often `Task2.Caption`; one with neither text is a bad record. The annotations do not fit in
memory, so a unit (one archive) streams them and keeps only its own. Annotations that belong to no
archive are reported once, by the first unit.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from mdm.sources.fields import object_field, text_field
from mdm.sources.packed import list_files, read_files
from mdm.sources.record import (
    UNIT_BYTES,
    BadRecord,
    RawRecord,
    Unit,
    attempt,
    check_split,
    make_units,
)
from mdm.sources.streams import ARCHIVE_ERRORS, describe, expect_utf8, tgz_lines, tgz_members
from mdm.sources.textfile import is_clutter, parse_line

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
_SINGLE_ARCHIVE = "imgs"  # the name of a split's only archive


def units(root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """One unit per archive of images (`unit_bytes` is ignored: a gzip stream cannot be split).

    Raises ValueError if the annotations or the archives are missing, or the annotations are UTF-16.
    """
    check_split(SOURCE, split, SPLITS)
    annotations = root / ANNOTATIONS[split]
    if not annotations.is_file():
        raise ValueError(f"{SOURCE}: no annotations {ANNOTATIONS[split]} in {root}")
    with expect_utf8(SOURCE, annotations):
        next(tgz_lines(annotations), None)
    archives = _archives(root, split)
    if not archives:
        raise ValueError(f"{SOURCE}: no data/{split}/imgs/*.tgz in {root}, nor their folders")
    annotation_file = (ANNOTATIONS[split], annotations.stat().st_size)
    parts = []
    for name, path in archives.items():
        below = path.relative_to(root).as_posix()
        packed = path.is_file()
        files = [(below, path.stat().st_size)] if packed else list(list_files(root, below))
        kind = f"{'archive' if packed else 'folder'} {name}"
        parts.append((kind, [file for file, _ in files], [annotation_file, *files], 0, 0))
    return make_units(SOURCE, split, root, parts)


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The archive's annotated images, in the archive's order.

    Ids are `journeydb/<split>/<archive>/<file>`. An image without annotation and an annotation
    without image are both bad records.
    """
    form, _, archive = unit.kind.partition(" ")
    packed = form == "archive"
    prefix = f"{SOURCE}/{unit.split}/{archive}"
    place = f"{unit.files[0]}::" if packed else f"{PurePosixPath(unit.files[0]).parent}/"
    texts_by_file: dict[str, str | None] = {}  # None: already reported as bad
    yield from _collect_texts(unit, archive, texts_by_file)
    done: set[str] = set()
    damage = ""
    try:
        root = Path(unit.root)
        members = tgz_members(root / unit.files[0]) if packed else read_files(root, unit.files)
        for member in members:
            name = PurePosixPath(member.name).name
            record_id = f"{prefix}/{name}"
            if name in done:
                problem = "duplicate id: the archive holds this name twice"
                yield unit.bad_record(record_id, place + name, problem)
                continue
            done.add(name)
            text = texts_by_file.pop(name, "")
            if text is None:
                continue
            if member.data is None:
                yield unit.bad_record(record_id, place + name, member.problem)
            elif not text:
                yield unit.bad_record(record_id, place + name, "image without annotation")
            else:
                origin = place + member.name if packed else member.name
                yield RawRecord(record_id, SOURCE, unit.split, origin, member.data, text)
    except ARCHIVE_ERRORS as error:
        damage = f"unreadable archive after {len(done)} images: {describe(error)}"
        yield unit.bad_record(f"{prefix}/", unit.files[0], damage)
    problem = f"missing file: {damage or 'annotated, but not in the archive'}"
    for name, text in texts_by_file.items():
        if text is not None:
            yield unit.bad_record(f"{prefix}/{name}", place + name, problem)


def texts(root: Path, split: str) -> Iterator[str]:
    """Every usable caption, from the annotations alone."""
    first_unit = units(root, split)[0]
    with suppress(*ARCHIVE_ERRORS):  # `read` reports them
        for _, line in tgz_lines(Path(first_unit.root) / ANNOTATIONS[split]):
            text = attempt("", lambda line: _text(parse_line(line)), line)
            if isinstance(text, str):
                yield text


def _archives(root: Path, split: str) -> dict[str, Path]:
    """The archives by name; a folder stands in for a missing archive of its name."""
    folder = root / "data" / split
    archives: dict[str, Path] = {}
    paths = [path for place in (folder / "imgs", folder) for path in place.glob("*")]
    paths = [path for path in paths if not is_clutter(path.name)]
    for path in paths:
        if path.suffix == _TGZ and not path.stem.endswith(".jsonl") and path.is_file():
            archives.setdefault(path.stem, path)
    for path in paths:
        if path.is_dir() and any(list_files(root, path.relative_to(root).as_posix())):
            archives.setdefault(path.name, path)
    single = archives.pop(_SINGLE_ARCHIVE, None)
    if not archives and single:
        return {_SINGLE_ARCHIVE: single}
    return dict(sorted(archives.items(), key=lambda item: item[0] + _TGZ))


def _collect_texts(
    unit: Unit, archive: str, texts_by_file: dict[str, str | None]
) -> Iterator[BadRecord]:
    """Fill `texts_by_file` with the texts of this archive, and yield the bad annotations.

    The first unit reads all lines. Other units skip lines that cannot be theirs without parsing
    them, and leave problems to the first unit.
    """
    is_first = unit.index == 0
    archives = _archives(Path(unit.root), unit.split) if is_first else {}
    elsewhere: Counter[str] = Counter()  # annotated images by missing archive
    number, needle = 0, archive.encode()
    lines = tgz_lines(Path(unit.root) / ANNOTATIONS[unit.split])
    try:
        for number, line in (pair for pair in lines if is_first or needle in pair[1]):
            origin = f"{ANNOTATIONS[unit.split]}:{number}"
            annotation = attempt(origin, _parse, line, archive == _SINGLE_ARCHIVE)
            if isinstance(annotation, ValueError):
                if is_first:
                    yield _bad_annotation(unit, f"line {number}", number, annotation)
                continue
            folder, file, fields = annotation
            if folder != archive:
                elsewhere[folder] += is_first and folder not in archives
            elif file in texts_by_file:
                problem = "duplicate id: a second annotation of this image"
                yield _bad_annotation(unit, f"{folder}/{file}", number, problem)
            else:
                text = attempt(origin, _text, fields)
                texts_by_file[file] = text if isinstance(text, str) else None
                if isinstance(text, ValueError):
                    yield _bad_annotation(unit, f"{folder}/{file}", number, text)
    except ARCHIVE_ERRORS as error:
        if is_first:
            problem = f"unreadable annotations after line {number}: {describe(error)}"
            yield _bad_annotation(unit, f"line {number}", number, problem)
    for folder, count in sorted((+elsewhere).items()):
        problem = f"missing file: no archive {folder}.tgz for its {count} annotated images"
        yield _bad_annotation(unit, f"{folder}/", 0, problem)


def _bad_annotation(unit: Unit, name: str, number: int, problem: ValueError | str) -> BadRecord:
    origin = f"{ANNOTATIONS[unit.split]}:{number}"
    return unit.bad_record(f"{SOURCE}/{unit.split}/{name}", origin, str(problem))


def _parse(line: bytes, single: bool) -> tuple[str, str, dict[str, Any]]:
    """The archive and file of an image, and its annotation's fields.

    Folders before the archive do not count. With a `single` archive, only the file does.
    """
    annotation = parse_line(line)
    path = text_field(annotation.get("img_path"), "img_path")
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if ".." in parts or len(parts) < (1 if single else 2):
        raise ValueError(f"field img_path is {path[:80]!r}, not ./<archive>/<file>")
    return _SINGLE_ARCHIVE if single else parts[-2], parts[-1], annotation


def _text(annotation: dict[str, Any]) -> str:
    """The caption if there is one, otherwise the prompt that generated the image."""
    task = annotation.get("Task2")
    caption = None if task is None else object_field(task, "Task2").get("Caption")
    if caption is not None:
        return text_field(caption, "Task2.Caption")
    return text_field(annotation.get("prompt"), "prompt")
