"""Which records to leave out as exact or near duplicates of others, in bounded memory.

Every record writes a few rows of (key, place) to files chosen by the key. Records with a key in
common therefore meet in one file, and files are processed one after the other: memory holds one of
BUCKETS files. The result depends only on the records and their places, not on the order or number
of the workers that surveyed them.

The first of equal records stays, by unit and position. So does the first of nearly equal ones: a
record is left out if an earlier one in any of its files is alike, so the first of a chain of alike
records stays. Records under one key are compared with its first MAX_LEADERS different records.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mdm.preprocess import similar
from mdm.preprocess.survey import Survey

DUPLICATE = "duplicate"  # the same content again: dropped
NEAR_DUPLICATE = "near duplicate"  # nearly the same content again: dropped
DROPPED = (DUPLICATE, NEAR_DUPLICATE)  # records left out for other reasons are quarantined
ID_TAKEN = "id taken by another record"  # other content under the same id: quarantined
BUCKETS = 64
MAX_LEADERS = 128

# High and low halves of the key, and the record's place: its unit << 32 | its position.
_IDS = np.dtype([("high", "u8"), ("low", "u8"), ("content", "u8", 2), ("at", "u8")])
_CONTENTS = np.dtype([("high", "u8"), ("low", "u8"), ("at", "u8")])
_NEAR = np.dtype([("high", "u8"), ("number", "u8")])


class DuplicateIndex(ExitStack):
    """Collects surveys in files in `folder`, then says what to leave out.

    On disk: 64 bytes a record; for near duplicates 136 more, and 16 a key (4 keys for an image, up
    to 16 for a text).
    """

    def __init__(self, folder: Path, *, images: bool) -> None:
        super().__init__()
        self._images = images
        self._folder = folder
        self._files: dict[tuple[str, int], IO[bytes]] = {}
        self._signatures = self._open("signatures")
        self._places = self._open("places")
        self._records = 0
        self._failed: dict[int, dict[int, str]] = {}

    def _open(self, name: str) -> IO[bytes]:
        return self.enter_context((self._folder / name).open("w+b"))

    def add(self, unit: int, survey: Survey) -> None:
        """Adds the survey of the unit with this index."""
        self._failed[unit] = survey.failed
        at = np.uint64(unit << 32) | survey.positions.astype(np.uint64)
        ids = np.zeros(len(at), _IDS)
        ids["high"], ids["low"], ids["at"] = survey.ids[:, 0], survey.ids[:, 1], at
        ids["content"] = survey.contents
        self._spill("ids", ids)
        known = survey.contents.any(1)
        contents = np.zeros(int(known.sum()), _CONTENTS)
        contents["high"], contents["low"] = survey.contents[known].T
        contents["at"] = at[known]
        self._spill("contents", contents)
        if len(survey.keys):
            near = np.zeros(len(survey.keys), _NEAR)
            near["high"] = survey.keys
            near["number"] = survey.key_rows.astype(np.uint64) + np.uint64(self._records)
            self._spill("near", near)
            self._signatures.write(survey.signatures.tobytes())
            self._places.write(at.tobytes())
            self._records += len(at)

    def _spill(self, kind: str, rows: NDArray[Any]) -> None:
        """Appends each row to the file of its bucket."""
        bucket = rows["high"] % np.uint64(BUCKETS)
        order = np.argsort(bucket, kind="stable")
        rows, bucket = rows[order], bucket[order]
        for start, stop in _runs(bucket):
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
        """For each unit, the positions to leave out and why; failed records are among them."""
        out = [dict(self._failed.get(unit, {})) for unit in range(units)]

        def note(places: NDArray[np.uint64], reason: str) -> None:
            for at in places.tolist():
                out[at >> 32].setdefault(at & 0xFFFFFFFF, reason)

        same, taken = self._by_id()
        note(taken, ID_TAKEN)
        same = np.union1d(same, self._by_content(taken))
        note(same, DUPLICATE)
        if self._records:
            note(self._by_likeness(np.union1d(same, taken)), NEAR_DUPLICATE)
        return out

    def _by_id(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Places of records with an earlier record's id: with the same and with other content."""
        same, taken = [], []
        for number in range(BUCKETS):
            rows, first = _grouped(self._bucket("ids", number, _IDS))
            later = first != np.arange(len(rows))
            equal = (rows["content"] == rows["content"][first]).all(1) & rows["content"].any(1)
            same.append(rows["at"][later & equal])
            taken.append(rows["at"][later & ~equal])
        return np.concatenate(same), np.concatenate(taken)

    def _by_content(self, without: NDArray[np.uint64]) -> NDArray[np.uint64]:
        same = []
        for number in range(BUCKETS):
            rows = self._bucket("contents", number, _CONTENTS)
            rows, first = _grouped(rows[~np.isin(rows["at"], without)])
            same.append(rows["at"][first != np.arange(len(rows))])
        return np.concatenate(same)

    def _by_likeness(self, without: NDArray[np.uint64]) -> NDArray[np.uint64]:
        self._signatures.flush()
        self._places.flush()
        shape = (self._records, similar.SIGNATURE_BYTES)
        signatures = np.memmap(self._folder / "signatures", np.uint8, "r", shape=shape)
        places = np.memmap(self._folder / "places", np.uint64, "r", shape=(self._records,))
        near: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
        for number in range(BUCKETS):
            rows = self._bucket("near", number, _NEAR)
            rows = rows[~np.isin(places[rows["number"]], without)]
            rows = rows[np.lexsort((places[rows["number"]], rows["high"]))]
            for start, stop in _runs(rows["high"]):
                if stop - start > 1:
                    numbers = rows["number"][start:stop]
                    near.append(places[numbers][self._followers(signatures[numbers])])
        return np.unique(np.concatenate(near))

    def _followers(self, group: NDArray[np.uint8]) -> list[int]:
        """Which of the signatures [n, SIGNATURE_BYTES], in order, are like an earlier one."""
        leaders = np.zeros((0, group.shape[1]), np.uint8)
        followers = []
        for i, one in enumerate(group):
            if len(leaders) and similar.alike(one, leaders, self._images):
                followers.append(i)
            elif len(leaders) < MAX_LEADERS:
                leaders = np.concatenate([leaders, one[None]])
        return followers


def _runs(keys: NDArray[Any]) -> list[tuple[int, int]]:
    """Start and end of each run of equal keys."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)]).tolist()
    return list(zip(starts, [*starts[1:], len(keys)], strict=False))


def _grouped(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The rows sorted by key and place, and for each the index of the first one with its key."""
    rows = rows[np.lexsort((rows["at"], rows["low"], rows["high"]))]
    new = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
    index = np.arange(len(rows))
    return rows, np.maximum.accumulate(np.where(np.r_[True, new][: len(rows)], index, 0))
