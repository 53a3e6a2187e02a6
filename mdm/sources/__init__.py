"""Readers of published data sets: each yields `RawRecord`s."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mdm.sources import captions, imagenet, journeydb, questions, ultrachat
from mdm.sources.llava import LLAVA
from mdm.sources.record import BadRecord, RawRecord, Reader, Unit, one_record
from mdm.utils.uri import folder_of

READERS: dict[str, Reader] = {
    reader.SOURCE: reader
    for reader in (
        imagenet,
        journeydb,
        ultrachat,
        captions.COCO,
        captions.FLICKR30K,
        questions.GQA,
        questions.OCRVQA,
        questions.TEXTVQA,
        questions.VISUAL_GENOME,
        questions.VQAV2,
        questions.VIZWIZ,
        questions.OKVQA,
        LLAVA,
    )
}


def get(name: str) -> Reader:
    """The reader of a published layout; ValueError lists the choices for an unknown one."""
    if name not in READERS:
        raise ValueError(f"unknown dataset {name!r}; choose one of {', '.join(READERS)}")
    return READERS[name]


def training_splits(name: str, root: Path) -> tuple[str, ...]:
    """The splits of the data set in this folder to train on; ValueError names what is missing."""
    reader = get(name)
    for form in reader.TRAINING:
        if splits := tuple(split for split in form if _has_split(reader, root, split)):
            return splits
    reader.units(root, reader.TRAINING[0][0])  # raises ValueError: nothing is there
    return ()


def held_out_split(name: str, root: Path) -> str:
    """The split of the data set in this folder to evaluate on; "" if there is none."""
    reader = get(name)
    return reader.HELD_OUT if _has_split(reader, root, reader.HELD_OUT) else ""


def _has_split(reader: Reader, root: Path, split: str) -> bool:
    try:
        reader.units(root, split)
    except ValueError:
        return False
    return True


def read(unit: Unit) -> Iterator[RawRecord | BadRecord]:
    """The unit's records, from its reader.

    If the reader itself fails, the rest of the unit cannot be read, and a bad record reports it.
    ValueError is raised only before the first record: the data set lacks what the error names.
    """
    unit_records = iter(get(unit.source).read(unit))
    origin = unit.files[0] if unit.files else unit.kind
    number = 0
    while True:
        try:
            with one_record(origin):
                record = next(unit_records, None)
        except ValueError as error:
            if not number and type(error) is ValueError:
                raise
            record_id = f"{unit.source}/{unit.split}/unit {unit.index}, record {number}"
            reason = f"the reader failed and the rest of the unit is left out: {error}"
            yield unit.bad_record(record_id, origin, reason)
            return
        if record is None:
            return
        number, origin = number + 1, record.origin
        yield record


def records(name: str, root: Path, split: str) -> Iterator[RawRecord | BadRecord]:
    """All records of a split, unit by unit, in one process."""
    for unit in get(name).units(root, split):
        yield from read(unit)


def parse_datasets(items: Sequence[str]) -> list[tuple[str, Path]]:
    """Each `name=folder` as a pair; ValueError if there is none, or one is malformed or unknown.

    One item may hold several, separated by commas. Only a comma before a known name and "="
    separates them, because folder names may contain commas.
    """
    if not items:
        raise ValueError("no data set is given, as name=folder")
    datasets = []
    split = re.compile(f",(?=(?:{'|'.join(READERS)})=)").split
    for item in itertools.chain.from_iterable(map(split, items)):
        name, equals, uri = item.partition("=")
        if not (name and equals and uri):
            raise ValueError(f"{item!r} is not name=folder")
        get(name)
        root = Path(folder_of(uri))
        if not root.is_dir():
            several = "; give several data sets by repeating the flag" if "," in uri else ""
            raise ValueError(f"dataset {name}: no folder {root}{several}")
        datasets.append((name, root))
    return datasets
