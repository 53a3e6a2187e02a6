"""ImageNet (ILSVRC 2012): the published tars, or folders `train/<wnid>/*.JPEG` and `val/`.

Tars: `ILSVRC2012_img_train.tar` (one tar a class inside) and `ILSVRC2012_img_val.tar`, whose labels
stand in the devkit as ILSVRC ids (an order of their own, not that of the wnids). Extracted, the
validation pictures lie flat in `val/*.JPEG` with the same labels, or sorted into `val/<wnid>/`. A
label here is the index in the sorted list of wnids. Class names come from `LOC_synset_mapping.txt`
or from the devkit's `meta.mat`; one of a class's names serves as a picture's caption.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

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
    DamagedHeaderError,
    Member,
    Slice,
    describe,
    open_tar,
    read_file,
    read_lines,
    surviving_headers,
    tar_members,
    tgz_members,
)
from mdm.sources.textfile import is_clutter

SOURCE = "imagenet"
SPLITS: tuple[str, ...] = ("train", "val")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
MAPPING = "LOC_synset_mapping.txt"
DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_PICTURES = (".jpeg", ".jpg", ".png")


def units(root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Pieces of about `unit_bytes`.

    Folders: slices of the pictures in the order of a hash of their names, so that every unit holds
    all classes. Train tar: one unit a class. Val tar: runs of pictures. Raises ValueError where
    neither form is there, or the class names are missing.
    """
    check_split(SOURCE, split, SPLITS)
    _classes(root)
    folder, tar = root / split, root / (TRAIN_TAR if split == "train" else VAL_TAR)
    if folder.is_dir():
        return _folder_units(root, split, unit_bytes)
    if not tar.is_file():
        raise ValueError(f"{SOURCE}: neither folder {split}/ nor {tar.name} in {root}")
    if split == "val":
        _ground_truth(root)
    return _tar_units(root, split, tar, unit_bytes)


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The unit's pictures with label and caption. Ids are `imagenet/<split>/<wnid>/<file>`."""
    wnids, names = _classes(Path(unit.root))
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    pictures = _from_folder(unit) if unit.kind == "files" else _from_tar(unit)
    seen: set[str] = set()
    for wnid, member in pictures:
        name = member.name.rsplit("/", 1)[-1]
        key = f"{SOURCE}/{unit.split}/{wnid}/{name}"
        origin = member.name
        if unit.kind != "files":
            origin = "::".join(filter(None, (unit.files[0], _inner(unit), name)))
        if not _is_unicode(key):
            shown = key.encode("utf-8", "backslashreplace").decode()
            yield BadRecord(shown, SOURCE, unit.split, origin, "file name is not valid UTF-8")
        elif member.data is None:
            yield BadRecord(key, SOURCE, unit.split, origin, member.problem)
        elif wnid not in labels:
            yield BadRecord(key, SOURCE, unit.split, origin, f"{wnid!r} is not among the classes")
        elif key in seen:
            yield BadRecord(key, SOURCE, unit.split, origin, "duplicate id")
        else:
            seen.add(key)
            label = labels[wnid]
            try:
                with one_record(origin):
                    text = caption(names[label], key)
            except ValueError as error:
                yield BadRecord(key, SOURCE, unit.split, origin, str(error))
                continue
            yield RawRecord(
                id=key,
                source=SOURCE,
                split=unit.split,
                origin=origin,
                image=member.data,
                text=text,
                label=label,
            )


def texts(root: Path, split: str) -> Iterator[str]:
    """Every name of every class."""
    check_split(SOURCE, split, SPLITS)
    for names in class_names(root):
        yield from split_names(names)


def class_names(root: Path) -> tuple[str, ...]:
    """Names by label, as published: "tench, Tinca tinca". ValueError where no file has them."""
    return _classes(root)[1]


def split_names(names: str) -> list[str]:
    """The single names of one class."""
    return [name.strip() for name in names.split(",") if name.strip()]


def caption(names: str, record_id: str) -> str:
    """One of a class's names, chosen by a hash of the record's id: stable, and evenly spread."""
    choices = split_names(names)
    return choices[_hash(record_id) % len(choices)]


def _hash(text: str) -> int:
    data = text.encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---- folders


def _folder_units(root: Path, split: str, unit_bytes: int) -> list[Unit]:
    listing: list[tuple[str, int]] = []
    for outer in os.scandir(root / split):
        if is_clutter(outer.name):
            continue
        named = outer.name.lower().endswith(_PICTURES)  # a folder with a picture's name is none
        folder = f"{split}/{outer.name}" if _is(outer.is_dir) and not named else split
        try:
            inside = [*os.scandir(outer.path)] if folder != split else [outer]
        except OSError:  # a folder that may not be entered: its reader says why
            inside, folder = [outer], split
        for entry in inside:
            if not (entry.name.startswith(".") or is_clutter(entry.name)):
                size = entry.stat().st_size if _is(entry.is_file) else 0
                listing.append((f"{folder}/{entry.name}", size))
    if not listing:
        raise ValueError(f"{SOURCE}: no pictures in {root / split}/<wnid>/")
    if split == "val" and any(name.count("/") == 1 for name, _ in listing):
        _ground_truth(root)
    listing.sort(key=lambda entry: (_hash(entry[0]), entry[0]))
    slices: list[list[tuple[str, int]]] = [[]]
    filled = 0
    for name, size in listing:
        if slices[-1] and filled + size > unit_bytes:
            slices.append([])
            filled = 0
        slices[-1].append((name, size))
        filled += size
    return [
        Unit(
            source=SOURCE,
            split=split,
            index=index,
            root=str(root),
            kind="files",
            files=tuple(name for name, _ in piece),
            fingerprint=fingerprint([*piece, _class_file(root)]),
        )
        for index, piece in enumerate(slices)
    ]


def _is(kind: Callable[[], bool]) -> bool:
    """Of what an entry is; False for a link that leads in a circle."""
    try:
        return kind()
    except OSError:
        return False


def _from_folder(unit: Unit) -> Iterator[tuple[str, Member]]:
    for file in unit.files:
        try:
            with one_record(file):
                member = Member(file, read_file(Path(unit.root) / file))
        except ValueError as error:
            member = Member(file, None, str(error))
        if file.count("/") == 1:
            yield _validation_wnid(unit, member)
        else:
            yield file.split("/")[1], member


# ---- tars


def _tar_units(root: Path, split: str, tar: Path, unit_bytes: int) -> list[Unit]:
    size = tar.stat().st_size
    ranges: list[tuple[str, int, int]] = []  # kind, first byte, end
    end, cut, hole = 0, False, False
    try:
        with tar.open("rb") as file, open_tar(file, streaming=False) as outer:
            for info in surviving_headers(outer):
                if isinstance(info, DamagedHeaderError):
                    hole = True
                    continue
                if hole and split == "train" and not info.name.endswith(".tar"):
                    continue  # a picture of the class whose header is lost
                behind = hole
                if hole:  # its reader says what is wrong with it
                    ranges.append(("members", end, info.offset))
                    hole = False
                padded = info.offset_data + -(-info.size // 512) * 512
                if split == "train":
                    inner = (f"class {info.name}", info.offset_data, info.offset_data + info.size)
                    ranges.append(inner)
                elif ranges and not behind and padded - ranges[-1][1] <= unit_bytes:
                    ranges[-1] = ("members", ranges[-1][1], padded)
                else:
                    ranges.append(("members", info.offset, padded))
                end = padded
    except ARCHIVE_ERRORS:
        cut = True  # the rest becomes a unit below, and its reader says what is wrong with it
    if _has_content(tar, end):
        ranges.append(("members", end, size))
    elif cut or end > size:
        ranges.append(("cut", size, size))
    return [
        Unit(
            source=SOURCE,
            split=split,
            index=index,
            root=str(root),
            kind=kind,
            files=(tar.name,),
            fingerprint=fingerprint(
                [(tar.name, size), ("start", start), ("stop", stop), _class_file(root)]
            ),
            start=start,
            stop=stop,
        )
        for index, (kind, start, stop) in enumerate(ranges)
    ]


def _has_content(path: Path, start: int) -> bool:
    """Whether anything but zero blocks follows `start`: an archive's end is zeros."""
    with path.open("rb") as file:
        file.seek(start)
        return any(file.read(10240))


def _inner(unit: Unit) -> str:
    """The class's tar that the unit is; "" for pictures of the outer one."""
    return unit.kind.removeprefix("class ") if unit.kind.startswith("class ") else ""


def _from_tar(unit: Unit) -> Iterator[tuple[str, Member]]:
    """(wnid, picture); a class's tar names the wnid, the devkit those of the val tar."""
    path = Path(unit.root) / unit.files[0]
    inner = _inner(unit)
    wnid = Path(inner).stem
    done = 0
    if unit.kind == "cut":
        reason = f"the archive was cut off at byte {unit.start}: what followed is missing"
        yield "", Member(f"bytes {unit.start}-", None, reason)
        return
    try:
        with path.open("rb") as file:
            piece = io.BufferedReader(Slice(file, unit.start, unit.stop))
            for member in tar_members(piece, streaming=False):
                done += 1
                if inner:
                    yield wnid, member
                else:
                    yield _validation_wnid(unit, member)
    except ARCHIVE_ERRORS as error:
        where = inner or f"bytes {unit.start}-{unit.stop}"
        reason = f"unreadable tar {where} after {done} pictures: {describe(error)}"
        yield wnid, Member(f"{where}:{done}", None, reason)


def _validation_wnid(unit: Unit, member: Member) -> tuple[str, Member]:
    if unit.split == "train":
        problem = member.problem or "picture outside a class's tar or folder"
        return "", Member(member.name, None, problem)
    truth = _ground_truth(Path(unit.root))
    number = Path(member.name).stem.rsplit("_", 1)[-1]
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) <= len(truth):
        problem = f"no label: picture number {number!r}, and labels for 1 to {len(truth)}"
        return "", Member(member.name, None, problem)
    wnid, label = truth[int(number) - 1]
    if not wnid:
        problem = f"no label: line {int(number)} of {_TRUTH} is {label[:80]!r}, no class's id"
        return "", Member(member.name, None, member.problem or problem)
    return wnid, member


# ---- classes and the devkit


def _class_file(root: Path) -> tuple[str, int]:
    for name in (MAPPING, f"{DEVKIT}.tar.gz", f"{DEVKIT}/data/meta.mat"):
        if (root / name).is_file():
            return name, (root / name).stat().st_size
    raise ValueError(f"{SOURCE}: no class names in {root}; put {MAPPING} or {DEVKIT}.tar.gz there")


@lru_cache(maxsize=8)
def _classes(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sorted wnids and their names."""
    if _class_file(root)[0] != MAPPING:
        pairs = sorted(_devkit_classes(root).values())
    else:
        pairs = []
        lines = read_lines((root / MAPPING).read_bytes(), str(root / MAPPING))
        for number, line in enumerate(lines, start=1):
            wnid, *rest = line.split(maxsplit=1) or [""]
            names = rest[0] if rest else ""
            if wnid and not split_names(names):
                raise ValueError(f"{root / MAPPING}:{number}: {line!r} is not 'wnid name, name'")
            if wnid:
                pairs.append((wnid, names))
        pairs.sort()
    wnids = tuple(wnid for wnid, _ in pairs)
    if not wnids or len(set(wnids)) != len(wnids):
        raise ValueError(f"{root}: {_class_file(root)[0]} lists no class, or one class twice")
    return wnids, tuple(names for _, names in pairs)


def _devkit_file(root: Path, name: str) -> bytes:
    """A file of the devkit, from its archive or its extracted folder."""
    extracted = root / DEVKIT / name
    if extracted.is_file():
        return extracted.read_bytes()
    archive = root / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        raise ValueError(f"{SOURCE}: no devkit {archive.name} in {root}; val labels stand there")
    try:
        for member in tgz_members(archive):
            if member.name == f"{DEVKIT}/{name}" and member.data is not None:
                return member.data
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"{archive}: unreadable: {describe(error)}") from None
    raise ValueError(f"{archive} holds no {DEVKIT}/{name}")


@lru_cache(maxsize=8)
def _devkit_classes(root: Path) -> dict[int, tuple[str, str]]:
    """ILSVRC id -> (wnid, names), leaves of the hierarchy alone."""
    from scipy.io import loadmat  # a tenth of a second that the other forms need not pay

    synsets = loadmat(io.BytesIO(_devkit_file(root, "data/meta.mat")), squeeze_me=True)["synsets"]
    return {
        int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"]))
        for row in synsets
        if int(row["num_children"]) == 0
    }


@lru_cache(maxsize=8)
def _ground_truth(root: Path) -> tuple[tuple[str, str], ...]:
    """Of validation picture 1, 2, ...: the wnid, or "" for no class's id, and the line itself."""
    wnids = {str(number): wnid for number, (wnid, _) in _devkit_classes(root).items()}
    lines = _without_blanks(read_lines(_devkit_file(root, f"data/{_TRUTH}"), f"data/{_TRUTH}"))
    truth = tuple((wnids.get(line, ""), line) for line in lines)
    if not any(wnid for wnid, _ in truth):
        raise ValueError(f"{root}: data/{_TRUTH} holds not one class's id")
    return truth


def _without_blanks(lines: list[str]) -> list[str]:
    """The lines but blank ones around them, and between each two; another one is a lost label."""
    filled = [number for number, line in enumerate(lines) if line]
    if not filled:
        return []
    lines = lines[filled[0] : filled[-1] + 1]
    return lines[::2] if len(lines) > 1 and not any(lines[1::2]) else lines
