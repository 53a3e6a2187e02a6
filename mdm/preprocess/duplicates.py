"""Which records to leave out as exact or near duplicates of others, in bounded memory.

Every record writes a few rows of (key, place) to files chosen by the key, so that records with a
key in common meet in one file, and files are looked at one after the other: memory holds one file
of BUCKETS. What is found depends on the records and their places alone, never on the order or the
number of workers that surveyed them.

The first of equal records stays, by unit and position. Of nearly equal ones the first stays, too:
a record goes if one before it, in any of its files, is alike (so the first of a chain of likenesses
stays). A file's records under one key are compared with its first MAX_LEADERS different ones.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mdm.preprocess import similar
from mdm.preprocess.survey import Survey

DUPLICATE = "duplicate"  # the same content again: dropped
NEAR_DUPLICATE = "near duplicate"  # nearly the same content again: dropped
DROPPED = (DUPLICATE, NEAR_DUPLICATE)  # what else is left out is quarantined
ID_TAKEN = "id taken by another record"  # other content under the same id: quarantined
BUCKETS = 64
MAX_LEADERS = 128

_IDS = np.dtype([("high", "u8"), ("low", "u8"), ("content", "u8", 2), ("at", "u8")])
_CONTENTS = np.dtype([("high", "u8"), ("low", "u8"), ("at", "u8")])
_NEAR = np.dtype([("high", "u8"), ("number", "u8")])


class DuplicateIndex:
    """Collects surveys in files below `folder`, then says what to leave out.

    On disk: 64 bytes a record; with near duplicates 136 more, and 16 a key (4 for an image, up to
    16 for a text).
    """

    def __init__(self, folder: Path, *, images: bool, buckets: int = BUCKETS) -> None:
        self._images = images
        self._folder = folder
        self._buckets = buckets
        self._stack = ExitStack()
        self._files: dict[tuple[str, int], IO[bytes]] = {}
        self._signatures = self._open("signatures")
        self._places = self._open("places")
        self._records = 0
        self._failed: dict[int, dict[int, str]] = {}

    def __enter__(self) -> "DuplicateIndex":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self, name: str) -> IO[bytes]:
        return self._stack.enter_context((self._folder / name).open("w+b"))

    def add(self, unit: int, found: Survey) -> None:
        """The survey of the unit of this index."""
        self._failed[unit] = found.failed
        at = np.uint64(unit << 32) | found.positions.astype(np.uint64)
        ids = np.zeros(len(at), _IDS)
        ids["high"], ids["low"], ids["at"] = found.ids[:, 0], found.ids[:, 1], at
        ids["content"] = found.contents
        self._spill("ids", ids)
        known = found.contents.any(1)
        contents = np.zeros(int(known.sum()), _CONTENTS)
        contents["high"], contents["low"] = found.contents[known, 0], found.contents[known, 1]
        contents["at"] = at[known]
        self._spill("contents", contents)
        if len(found.keys):
            near = np.zeros(len(found.keys), _NEAR)
            near["high"] = found.keys
            near["number"] = found.key_rows.astype(np.uint64) + np.uint64(self._records)
            self._spill("near", near)
            self._signatures.write(found.signatures.tobytes())
            self._places.write(at.tobytes())
            self._records += len(at)

    def _spill(self, kind: str, rows: NDArray[Any]) -> None:
        if not len(rows):
            return
        bucket = rows["high"] % np.uint64(self._buckets)
        order = np.argsort(bucket, kind="stable")
        rows, bucket = rows[order], bucket[order]
        starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            key = kind, int(bucket[start])
            if key not in self._files:
                self._files[key] = self._open(f"{kind}-{key[1]:03d}")
            self._files[key].write(rows[start:stop].tobytes())

    def _bucket(self, kind: str, number: int, dtype: Any) -> NDArray[Any]:
        file = self._files.get((kind, number))
        if file is None:
            return np.zeros(0, dtype)
        file.seek(0)
        return np.frombuffer(file.read(), dtype)

    def left_out(self, units: int) -> list[dict[int, str]]:
        """For each unit, the positions to leave out and why; those that failed are among them."""
        out = [dict(self._failed.get(unit, {})) for unit in range(units)]

        def note(places: NDArray[np.uint64], reason: str) -> None:
            for at in places.tolist():
                out[at >> 32].setdefault(at & 0xFFFFFFFF, reason)

        same, taken = self._by_id()
        note(taken, ID_TAKEN)
        note(same, DUPLICATE)
        same = np.union1d(same, self._by_content(taken))
        note(same, DUPLICATE)
        if self._records:
            note(self._by_likeness(np.union1d(same, taken)), NEAR_DUPLICATE)
        return out

    def _by_id(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Places of records whose id came before: with the same content, and with another."""
        same, taken = [], []
        for number in range(self._buckets):
            rows = self._bucket("ids", number, _IDS)
            rows = rows[np.lexsort((rows["at"], rows["low"], rows["high"]))]
            first = _first_of_group(rows)
            later = first != np.arange(len(rows))
            equal = (rows["content"] == rows["content"][first]).all(1) & rows["content"].any(1)
            same.append(rows["at"][later & equal])
            taken.append(rows["at"][later & ~equal])
        return np.concatenate(same), np.concatenate(taken)

    def _by_content(self, without: NDArray[np.uint64]) -> NDArray[np.uint64]:
        same = []
        for number in range(self._buckets):
            rows = self._bucket("contents", number, _CONTENTS)
            rows = rows[~np.isin(rows["at"], without)]
            rows = rows[np.lexsort((rows["at"], rows["low"], rows["high"]))]
            same.append(rows["at"][_first_of_group(rows) != np.arange(len(rows))])
        return np.concatenate(same)

    def _by_likeness(self, without: NDArray[np.uint64]) -> NDArray[np.uint64]:
        self._signatures.flush()
        self._places.flush()
        width = similar.SIGNATURE_BYTES
        shape = (self._records, width)
        signatures = np.memmap(self._folder / "signatures", np.uint8, "r", shape=shape)
        places = np.memmap(self._folder / "places", np.uint64, "r", shape=(self._records,))
        found: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
        for number in range(self._buckets):
            rows = self._bucket("near", number, _NEAR)
            if not len(rows):
                continue
            at = places[rows["number"]]
            keep = ~np.isin(at, without)
            rows, at = rows[keep], at[keep]
            order = np.lexsort((at, rows["high"]))
            rows, at = rows[order], at[order]
            starts = np.flatnonzero(np.r_[True, rows["high"][1:] != rows["high"][:-1]][: len(rows)])
            stops = np.r_[starts[1:], len(rows)]
            many = stops - starts > 1
            found += [
                at[start:stop][self._followers(signatures[rows["number"][start:stop]])]
                for start, stop in zip(starts[many], stops[many], strict=True)
            ]
        return np.unique(np.concatenate(found))

    def _followers(self, group: NDArray[np.uint8]) -> list[int]:
        """Which of the signatures [n, width], in order, are like one before."""
        leaders = np.zeros((0, group.shape[1]), np.uint8)
        found = []
        for i, one in enumerate(group):
            if len(leaders) and similar.alike(one, leaders, self._images):
                found.append(i)
            elif len(leaders) < MAX_LEADERS:
                leaders = np.concatenate([leaders, one[None]])
        return found


def _first_of_group(rows: NDArray[Any]) -> NDArray[np.int64]:
    """For each of the sorted rows, the index of the first one with its key."""
    if not len(rows):
        return np.zeros(0, np.int64)
    new = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
    return np.maximum.accumulate(np.where(np.r_[True, new], np.arange(len(rows)), 0))


def left_out(surveys: Sequence[Survey], folder: Path, *, images: bool) -> list[dict[int, str]]:
    """What to leave out of units whose surveys are all at hand."""
    with DuplicateIndex(folder, images=images) as index:
        for number, found in enumerate(surveys):
            index.add(number, found)
        return index.left_out(len(surveys))
