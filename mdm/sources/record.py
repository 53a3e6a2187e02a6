"""What every reader takes and yields."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# Input bytes of one unit of work, unless the caller asks for another size.
UNIT_BYTES = 1 << 30


@dataclass(frozen=True)
class RawRecord:
    """One record of a data set as it was published, not yet decoded.

    `image` holds the file's bytes, `text` a caption, `turns` a dialogue (user first, alternating),
    `label` an index into the reader's class names. `origin` says where the bytes lie, for people:
    a path below the data set's folder, archive::member, or file@byte of an annotation; for an
    annotated picture the last and one of the others.
    """

    id: str
    source: str
    split: str
    origin: str
    image: bytes | None = None
    text: str | None = None
    turns: tuple[str, ...] = ()
    label: int | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read: quarantined with its reason, never dropped silently."""

    id: str
    source: str
    split: str
    origin: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """One independent piece of a data set: what a worker reads without asking anyone else.

    `files` are paths below `root`; `kind` tells the reader how to read them; `start` and `stop`
    bound the bytes, or row groups, of a piece of one file (0, 0: the whole). `fingerprint` is the
    sha256 of the names and sizes of its input, without `root`: a moved data set keeps its
    fingerprints.
    """

    source: str
    split: str
    index: int
    root: str
    kind: str
    files: tuple[str, ...]
    fingerprint: str
    start: int = 0
    stop: int = 0


class Reader(Protocol):
    """A published data set's layout. Modules of `mdm.sources` are readers."""

    SPLITS: tuple[str, ...]  # as published
    # The splits to train on, of those forms of the data set that are there the first one's. The
    # first split of a form has all of its pictures.
    TRAINING: tuple[tuple[str, ...], ...]
    HELD_OUT: str  # the split to measure on, "" where none is published

    def units(self, root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
        """The split's units, the same list for the same files; ValueError without the files."""
        ...

    def read(self, unit: Unit) -> Iterator[RawRecord | BadRecord]:
        """The unit's records, streamed. A bad record is yielded with its reason, never raised."""
        ...

    def texts(self, root: Path, split: str) -> Iterator[str]:
        """The split's usable texts (captions, class names, turns), without reading pictures."""
        ...


def fingerprint(entries: Iterable[tuple[str, int]]) -> str:
    """sha256 over (name, bytes) pairs in the order given."""
    digest = hashlib.sha256()
    for name, size in entries:
        digest.update(f"{name}\t{size}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def check_split(source: str, split: str, splits: tuple[str, ...]) -> None:
    """Raise ValueError unless the data set publishes `split`."""
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; choose one of {', '.join(splits)}")
