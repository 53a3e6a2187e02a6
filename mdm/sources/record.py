"""What every reader takes and yields, and what counts as a record's own fault."""

import errno
import hashlib
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# Input bytes of one unit of work, unless the caller asks for another size.
UNIT_BYTES = 1 << 30
# The machine fails, whichever record meets it: disk, open files, memory.
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_HONEST_BYTES = 512 << 20  # no sound record takes more memory
_LONGEST_REASON = 300  # characters of an error that nobody foresaw


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


class UnforeseenError(ValueError):
    """Handling a record failed in a way that no reader, decoder or filter says in its own words."""


@contextmanager
def one_record(
    origin: str = "", *, reason: str = "failed with", passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """What is inside handles one record: whatever goes wrong there is a ValueError.

    This is the one place that tells what is a record's fault. A plain ValueError and the errors
    of this project say what they mean, and pass as they are; so do those named in `passing`. Any
    other becomes an UnforeseenError of `reason`, the error's type and its message. What fails
    because of the machine is no record's fault: it goes on with a note that names `origin`.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        if type(error) is ValueError or type(error).__module__.split(".")[0] in ("mdm", "ray"):
            raise
        if _is_machines(error):
            if origin:
                error.add_note(f"at {origin}")
            raise
        raise UnforeseenError(f"{reason} {describe_fully(error)}") from error


def describe_fully(error: BaseException) -> str:
    """An error's type and message on one line that any file or terminal can hold."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - an error whose message fails
        text = ""
    text = text[:_LONGEST_REASON].encode("utf-8", "backslashreplace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_machines(error: Exception) -> bool:
    """Whether memory, disk or open files ran out; not for a record that asks for too much."""
    if isinstance(error, MemoryError):
        try:
            mmap.mmap(-1, _HONEST_BYTES).close()
        except OSError:
            return True
    return isinstance(error, OSError) and error.errno in _MACHINE
