"""ImageNet (ILSVRC 2012): the published tars, or folders `train/<wnid>/*.JPEG` and `val/`.

The tars are `ILSVRC2012_img_train.tar` (one tar per class inside) and `ILSVRC2012_img_val.tar`,
whose labels are in the devkit. Extracted, the validation images are all in `val/`, with the same
labels, or sorted into `val/<wnid>/`. A label is the index in the sorted list of wnids. The caption
of an image is one of the names of its class.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mdm.sources import streams
from mdm.sources.imagenet_classes import TRUTH, class_file, classes, ground_truth, split_names
from mdm.sources.packed import read_files
from mdm.sources.record import (
    UNIT_BYTES,
    BadRecord,
    RawRecord,
    Unit,
    check_split,
    make_units,
    one_record,
    runs,
)
from mdm.sources.streams import Member, describe
from mdm.sources.textfile import is_clutter

SOURCE = "imagenet"
SPLITS: tuple[str, ...] = ("train", "val")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
_EXTENSIONS = (".jpeg", ".jpg", ".png")


def units(root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Units of about `unit_bytes`.

    In folders, a unit is a slice of the images in the order of a hash of their names, so that every
    unit holds all classes. In the train tar it is a class, in the val tar a run of images. Raises
    ValueError if neither form exists, or the class names are missing.
    """
    check_split(SOURCE, split, SPLITS)
    classes(root)
    folder, tar = root / split, root / (TRAIN_TAR if split == "train" else VAL_TAR)
    if folder.is_dir():
        return _folder_units(root, split, unit_bytes)
    if not tar.is_file():
        raise ValueError(f"{SOURCE}: neither folder {split}/ nor {tar.name} in {root}")
    if split == "val":
        ground_truth(root)
    return _tar_units(root, split, tar, unit_bytes)


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The unit's images with label and caption. Ids are `imagenet/<split>/<wnid>/<file>`."""
    wnids, names = classes(Path(unit.root))
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    seen: set[str] = set()
    for wnid, member in _read_folder(unit) if unit.kind == "files" else _read_tar(unit):
        name = member.name.rsplit("/", 1)[-1]
        record_id = f"{SOURCE}/{unit.split}/{wnid}/{name}"
        origin = member.name
        if unit.kind != "files":
            class_tar = unit.kind.partition("class ")[2]  # "" for images in the outer tar
            origin = "::".join(filter(None, (unit.files[0], class_tar, name)))
        printable = record_id.encode("utf-8", "backslashreplace").decode()
        try:
            if printable != record_id:
                raise ValueError("file name is not valid UTF-8")
            if member.data is None:
                raise ValueError(member.problem)
            if (label := labels.get(wnid)) is None:
                raise ValueError(f"{wnid!r} is not among the classes")
            if record_id in seen:
                raise ValueError("duplicate id")
            seen.add(record_id)
            with one_record(origin):
                text = caption(names[label], record_id)
        except ValueError as error:
            yield unit.bad_record(printable, origin, str(error))
        else:
            yield RawRecord(record_id, SOURCE, unit.split, origin, member.data, text, label=label)


def texts(root: Path, split: str) -> Iterator[str]:
    """Every name of every class."""
    check_split(SOURCE, split, SPLITS)
    for names in class_names(root):
        yield from split_names(names)


def class_names(root: Path) -> tuple[str, ...]:
    """Names by label, as published: "tench, Tinca tinca". ValueError if no file holds them."""
    return classes(root)[1]


def caption(names: str, record_id: str) -> str:
    """One of a class's names, chosen evenly and reproducibly by a hash of the record's id."""
    choices = split_names(names)
    return choices[_hash(record_id) % len(choices)]


def _hash(text: str) -> int:
    data = text.encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# ---- folders


def _folder_units(root: Path, split: str, unit_bytes: int) -> list[Unit]:
    listing: list[tuple[str, int]] = []
    for outer in os.scandir(root / split):
        if is_clutter(outer.name):
            continue
        folder, entries = split, [outer]
        # A folder named like an image, or one that may not be listed, is reported by the reader.
        if not outer.name.lower().endswith(_EXTENSIONS):
            with suppress(OSError):
                folder, entries = f"{split}/{outer.name}", [*os.scandir(outer.path)]
        for entry in entries:
            if not (entry.name.startswith(".") or is_clutter(entry.name)):
                size = 0
                with suppress(OSError):  # a broken or circular link
                    size = entry.stat().st_size if entry.is_file() else 0
                listing.append((f"{folder}/{entry.name}", size))
    if not listing:
        raise ValueError(f"{SOURCE}: no images in {root / split}/<wnid>/")
    if split == "val" and any(name.count("/") == 1 for name, _ in listing):
        ground_truth(root)
    listing.sort(key=lambda file: (_hash(file[0]), file[0]))
    names_file = class_file(root)
    parts = []
    for start, stop in runs([size for _, size in listing], unit_bytes):
        files = listing[start:stop]
        parts.append(("files", [name for name, _ in files], [*files, names_file], 0, 0))
    return make_units(SOURCE, split, root, parts)


def _read_folder(unit: Unit) -> Iterator[tuple[str, Member]]:
    """(wnid, image) of each file; the folder gives the wnid, or the devkit for a flat `val/`."""
    for member in read_files(Path(unit.root), unit.files):
        _, *folders, _ = member.name.split("/")
        yield (folders[0], member) if folders else _outer_image(unit, member)


# ---- tars


def _tar_units(root: Path, split: str, tar: Path, unit_bytes: int) -> list[Unit]:
    size = tar.stat().st_size
    ranges: list[tuple[str, int, int]] = []  # kind, first byte, end
    end, truncated, gap = 0, False, False
    try:
        with tar.open("rb") as file, streams.open_tar(file) as outer:
            for info in streams.surviving_headers(outer):
                if isinstance(info, streams.DamagedHeaderError):
                    gap = True
                    continue
                if gap and split == "train" and not info.name.endswith(".tar"):
                    continue  # an image of the class whose header is damaged
                if gap:  # a unit of its own, whose reader reports the damage
                    ranges.append(("members", end, info.offset))
                start, padded = info.offset_data, info.offset_data + -(-info.size // 512) * 512
                if split == "train":
                    ranges.append((f"class {info.name}", start, start + info.size))
                elif ranges and not gap and padded - ranges[-1][1] <= unit_bytes:
                    ranges[-1] = ("members", ranges[-1][1], padded)
                else:
                    ranges.append(("members", info.offset, padded))
                end, gap = padded, False
    except streams.ARCHIVE_ERRORS:
        truncated = True  # the rest becomes a unit below, whose reader reports the error
    with tar.open("rb") as rest:
        rest.seek(end)
        has_more = any(rest.read(10240))  # an archive ends in zeros
    if has_more:
        ranges.append(("members", end, size))
    elif truncated or end > size:
        ranges.append(("cut", size, size))
    published, names_file = (tar.name, size), class_file(root)
    parts = [
        (kind, [tar.name], [published, ("start", start), ("stop", stop), names_file], start, stop)
        for kind, start, stop in ranges
    ]
    return make_units(SOURCE, split, root, parts)


def _read_tar(unit: Unit) -> Iterator[tuple[str, Member]]:
    """(wnid, image); the name of a class's tar gives the wnid, or the devkit for the val tar."""
    if unit.kind == "cut":
        reason = f"the archive was cut off at byte {unit.start}: the rest is missing"
        yield "", Member(f"bytes {unit.start}-", None, reason)
        return
    class_tar, count = unit.kind.partition("class ")[2], 0
    try:
        with (Path(unit.root) / unit.files[0]).open("rb") as file:
            for member in streams.tar_members(streams.Slice(file, unit.start, unit.stop)):
                count += 1
                yield (Path(class_tar).stem, member) if class_tar else _outer_image(unit, member)
    except streams.ARCHIVE_ERRORS as error:
        where = class_tar or f"bytes {unit.start}-{unit.stop}"
        reason = f"unreadable tar {where} after {count} images: {describe(error)}"
        yield Path(class_tar).stem, Member(f"{where}:{count}", None, reason)


def _outer_image(unit: Unit, member: Member) -> tuple[str, Member]:
    """(wnid, image) of an image outside a class's tar or folder: by its number in the devkit."""
    if unit.split == "train":
        problem = member.problem or "image outside a class's tar or folder"
        return "", Member(member.name, None, problem)
    truth = ground_truth(Path(unit.root))
    number = Path(member.name).stem.rsplit("_", 1)[-1]
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) <= len(truth):
        problem = f"no label: image number {number!r}, but labels are for 1 to {len(truth)}"
        return "", Member(member.name, None, problem)
    wnid, line = truth[int(number) - 1]
    if not wnid:
        problem = f"no label: line {int(number)} of {TRUTH} is {line[:80]!r}, not a class id"
        return "", Member(member.name, None, member.problem or problem)
    return wnid, member
