"""Where rows lie: row number <-> (shard, record batch, row in it), and the batches to shuffle.

The rows of a data set are numbered in storage order. For shuffling, the rows of a manifest part are
cut into batches of equal size: first its full record batches, then merged batches, which join the
short last record batches of its shards. Only the last merged batch may be short, so the number of
rows in a part alone determines how many batches it has.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mdm.data.manifest import Manifest
from mdm.data.manifest_parts import ShardPart, starts

Rows = NDArray[np.int64]


class PartLayout:
    """The batches of one manifest part; rows are counted from the part's first one."""

    def __init__(self, shard_rows: Rows, size: int) -> None:
        self.size = size
        self.shard_start = starts(shard_rows)  # first row of each shard
        self.full_start = starts(shard_rows // size)  # full batches before each shard
        self.tail_start = starts(shard_rows % size)  # rows in short batches before each shard
        self.full = int(self.full_start[-1])
        self.batches = -(-int(self.shard_start[-1]) // size)

    def batch(self, index: int) -> Rows:
        """Rows of a full or merged batch."""
        if index < self.full:
            shard = int(np.searchsorted(self.full_start, index, side="right")) - 1
            first = self.shard_start[shard] + (index - self.full_start[shard]) * self.size
            return np.arange(first, first + self.size)
        first = (index - self.full) * self.size
        tail = np.arange(first, min(first + self.size, int(self.tail_start[-1])))
        shard_of = np.searchsorted(self.tail_start, tail, side="right") - 1
        rows: Rows = self.shard_start[shard_of + 1] - self.tail_start[shard_of + 1] + tail
        return rows

    def batch_of(self, row: int) -> int:
        """The full or merged batch that holds a row."""
        shard = int(np.searchsorted(self.shard_start, row, side="right")) - 1
        within = row - int(self.shard_start[shard])
        full = int(self.full_start[shard + 1] - self.full_start[shard])
        if within < full * self.size:
            return int(self.full_start[shard]) + within // self.size
        return self.full + (within - full * self.size + int(self.tail_start[shard])) // self.size

    def locate(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """(shard of the part, record batch in it, row in the batch) of each row."""
        shards = np.searchsorted(self.shard_start, rows, side="right") - 1
        batches, within = np.divmod(rows - self.shard_start[shards], self.size)
        return shards, batches, within


class RowLayout:
    """The rows of a manifest. The layout of a part is known once that part has been fetched."""

    def __init__(self, manifest: Manifest) -> None:
        parts = manifest.shards
        self.manifest = manifest
        self.size = manifest.batch_rows
        self.rows = manifest.rows
        self.parts = len(parts.infos)
        self.part_start = parts.row_start  # first row of each part, and the end
        self.part_rows = np.diff(parts.row_start)

        def layout(number: int) -> PartLayout:
            part = parts.part(number)
            assert isinstance(part, ShardPart)
            return PartLayout(part.rows, self.size)

        self.part = lru_cache(maxsize=64)(layout)

    def batch(self, part: int, index: int) -> Rows:
        """Row numbers of a full or merged batch of a part."""
        rows: Rows = self.part_start[part] + self.part(part).batch(index)
        return rows

    def locate(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """(shard, record batch in it, row in the batch) of each row number.

        Raises:
            ValueError: the data set has no such rows.
        """
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise ValueError(f"no rows {rows.min()} to {rows.max()}: the data set has {self.rows}")
        if self.parts == 1:
            return self.part(0).locate(rows)
        shards, batches, within = (np.empty(len(rows), np.int64) for _ in range(3))
        parts = np.searchsorted(self.part_start, rows, side="right") - 1
        for number in np.unique(parts).tolist():
            at = np.flatnonzero(parts == number)
            shard, batches[at], within[at] = self.part(number).locate(
                rows[at] - self.part_start[number]
            )
            shards[at] = shard + self.manifest.shards.item_start[number]
        return shards, batches, within
