"""ImageNet's class names and validation labels, from `LOC_synset_mapping.txt` or the devkit.

The devkit, an archive or its extracted folder, holds `meta.mat`, which gives every class an ILSVRC
id, and the ILSVRC ids of the validation images. ILSVRC ids are not in the order of the wnids.
"""

import io
from functools import lru_cache
from pathlib import Path

from mdm.sources.streams import ARCHIVE_ERRORS, describe, tgz_members
from mdm.sources.textfile import read_lines

MAPPING = "LOC_synset_mapping.txt"
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def class_file(root: Path) -> tuple[str, int]:
    """(name, bytes) of the file with the class names; ValueError if there is none."""
    for name in (MAPPING, f"{DEVKIT}.tar.gz", f"{DEVKIT}/data/meta.mat"):
        if (root / name).is_file():
            return name, (root / name).stat().st_size
    raise ValueError(f"imagenet: no class names in {root}; put {MAPPING} or {DEVKIT}.tar.gz there")


@lru_cache(maxsize=8)
def classes(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sorted wnids, and the names of each class: "tench, Tinca tinca"."""
    if class_file(root)[0] != MAPPING:
        pairs = sorted(devkit_classes(root).values())
    else:
        pairs = []
        lines = read_lines((root / MAPPING).read_bytes(), str(root / MAPPING))
        for number, line in enumerate(lines, start=1):
            wnid, names = [*line.split(maxsplit=1), "", ""][:2]
            if wnid and not split_names(names):
                raise ValueError(f"{root / MAPPING}:{number}: {line!r} is not 'wnid name, name'")
            if wnid:
                pairs.append((wnid, names))
        pairs.sort()
    wnids = tuple(wnid for wnid, _ in pairs)
    if not wnids or len(set(wnids)) != len(wnids):
        raise ValueError(f"{root}: {class_file(root)[0]} lists no class, or one class twice")
    return wnids, tuple(names for _, names in pairs)


def split_names(names: str) -> list[str]:
    """The single names of one class."""
    return [name.strip() for name in names.split(",") if name.strip()]


@lru_cache(maxsize=8)
def devkit_classes(root: Path) -> dict[int, tuple[str, str]]:
    """ILSVRC id -> (wnid, names), only for the leaves of the hierarchy."""
    from scipy.io import loadmat  # takes a tenth of a second that the other form does not need

    synsets = loadmat(io.BytesIO(_devkit_file(root, "data/meta.mat")), squeeze_me=True)["synsets"]
    return {
        int(synset["ILSVRC2012_ID"]): (str(synset["WNID"]), str(synset["words"]))
        for synset in synsets
        if int(synset["num_children"]) == 0
    }


@lru_cache(maxsize=8)
def ground_truth(root: Path) -> tuple[tuple[str, str], ...]:
    """For validation image 1, 2, ...: the wnid ("" if its line is not a class id) and the line."""
    wnids = {str(number): wnid for number, (wnid, _) in devkit_classes(root).items()}
    lines = _strip_blanks(read_lines(_devkit_file(root, f"data/{TRUTH}"), f"data/{TRUTH}"))
    truth = tuple((wnids.get(line, ""), line) for line in lines)
    if not any(wnid for wnid, _ in truth):
        raise ValueError(f"{root}: data/{TRUTH} holds no class id")
    return truth


def _devkit_file(root: Path, name: str) -> bytes:
    """A file of the devkit, from its archive or its extracted folder."""
    extracted = root / DEVKIT / name
    if extracted.is_file():
        return extracted.read_bytes()
    archive = root / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        raise ValueError(f"imagenet: no devkit {archive.name} in {root}; it holds the val labels")
    try:
        for member in tgz_members(archive):
            if member.name == f"{DEVKIT}/{name}" and member.data is not None:
                return member.data
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"{archive}: unreadable: {describe(error)}") from None
    raise ValueError(f"{archive} holds no {DEVKIT}/{name}")


def _strip_blanks(lines: list[str]) -> list[str]:
    """The lines without leading and trailing blank lines, and without one after every line.

    Any other blank line stands for a lost label and is kept.
    """
    filled = [number for number, line in enumerate(lines) if line]
    if not filled:
        return []
    lines = lines[filled[0] : filled[-1] + 1]
    return lines[::2] if len(lines) > 1 and not any(lines[1::2]) else lines
