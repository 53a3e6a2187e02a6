"""What every reader takes and yields, and which errors count as a record's own fault."""

import errno
import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

# Input bytes of one unit of work, unless the caller gives another size.
UNIT_BYTES = 1 << 30
# Faults of the machine, whichever record meets them: disk, open files, memory.
_MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_PROBE_BYTES = 512 << 20  # no valid record needs more memory
_MAX_REASON = 300  # characters of an unforeseen error's message

# (name, bytes) of each input file, in order.
Inputs = Iterable[tuple[str, int]]


@dataclass(frozen=True)
class RawRecord:
    """One record of a data set as published, not yet decoded.

    `image` holds the file's bytes, `text` a caption, `turns` a dialogue (user first, alternating),
    `label` an index into the reader's class names. `origin` says where the bytes are, for people:
    a path below the data set's folder, archive::member, or file@byte of an annotation; for an
    annotated image, its annotation and then its file.
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
    """One unit of work: a part of a published split that a worker reads on its own.

    `files` are paths below `root`; `kind` tells the reader how to read them; `start` and `stop`
    bound the bytes, or row groups, to read of a single file (0, 0: the whole file). `fingerprint`
    is the sha256 of the names and sizes of the input, without `root`: moving a data set does not
    change it.
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

    def bad_record(self, record_id: str, origin: str, reason: str) -> BadRecord:
        """A bad record of this unit's source and split."""
        return BadRecord(record_id, self.source, self.split, origin, reason)


class Reader(Protocol):
    """The reader of one published data set: a module of `mdm.sources`, or an `Annotated`."""

    SOURCE: str
    SPLITS: tuple[str, ...]  # as published
    # The splits to train on, for each form in which the data set is published. The first form that
    # is present is used. The first split of a form holds all of its images.
    TRAINING: tuple[tuple[str, ...], ...]
    HELD_OUT: str  # the split to evaluate on, "" if none is published

    def units(self, root: Path, split: str, *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
        """The split's units, the same list for the same files; ValueError if files are missing."""

    def read(self, unit: Unit) -> Iterator[RawRecord | BadRecord]:
        """The unit's records, streamed. A bad record is yielded with its reason, never raised."""

    def texts(self, root: Path, split: str) -> Iterator[str]:
        """The split's usable texts (captions, class names, turns), without reading images."""


def make_units(
    source: str,
    split: str,
    root: Path,
    parts: Iterable[tuple[str, Sequence[str], Inputs, int, int]],
) -> list[Unit]:
    """Units in the order of `parts`, each (kind, files, inputs to fingerprint, start, stop)."""
    units = []
    for index, (kind, files, inputs, start, stop) in enumerate(parts):
        place = (str(root), kind, tuple(files), fingerprint(inputs))
        units.append(Unit(source, split, index, *place, start, stop))
    return units


def runs(sizes: Sequence[int], unit_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) of runs of parts with these sizes, each of about `unit_bytes`."""
    starts, filled = [0], 0
    for i, size in enumerate(sizes):
        if i > starts[-1] and filled + size > unit_bytes:
            starts.append(i)
            filled = 0
        filled += size
    return list(pairwise([*starts, len(sizes)]))


def fingerprint(inputs: Inputs) -> str:
    """sha256 over (name, bytes) pairs in the given order."""
    digest = hashlib.sha256()
    for name, size in inputs:
        digest.update(f"{name}\t{size}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def check_split(source: str, split: str, splits: tuple[str, ...]) -> None:
    """Raise ValueError unless the data set publishes `split`."""
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; choose one of {', '.join(splits)}")


class UnforeseenError(ValueError):
    """A record failed in a way for which no reader, decoder or filter has a message of its own."""


@contextmanager
def one_record(
    origin: str = "", *, reason: str = "failed with", passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn any error inside the block, which handles a single record, into a ValueError.

    This is the only place that decides which errors are a record's fault. A plain ValueError and
    the errors of this project have a message of their own and pass unchanged, as do those listed in
    `passing`. Any other error becomes an UnforeseenError made of `reason`, the error's type and its
    message. A fault of the machine is not the record's: it is raised with a note that names
    `origin`.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        if type(error) is ValueError or type(error).__module__.split(".")[0] in ("mdm", "ray"):
            raise
        if _is_machine_fault(error):
            if origin:
                error.add_note(f"at {origin}")
            raise
        raise UnforeseenError(f"{reason} {describe_fully(error)}") from error


def attempt(origin: str, function: Callable[..., T], *arguments: Any) -> T | ValueError:
    """What the function, which handles a single record, returns; or its error, as `one_record`."""
    try:
        with one_record(origin):
            return function(*arguments)
    except ValueError as error:
        return error


def describe_fully(error: BaseException) -> str:
    """An error's type and message on one line that any file or terminal can hold."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - an error whose own message fails
        text = ""
    text = text[:_MAX_REASON].encode("utf-8", "backslashreplace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_machine_fault(error: Exception) -> bool:
    """Whether memory, disk or open files ran out; False if only this record needs too much."""
    if isinstance(error, MemoryError):
        try:
            mmap.mmap(-1, _PROBE_BYTES).close()
        except OSError:
            return True
    return isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS
