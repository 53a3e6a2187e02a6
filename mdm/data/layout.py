"""Where rows lie: row number <-> (shard, record batch, row in it) <-> (part, block, row in it).

Rows of a data set are numbered through in storage order. A block is a full record batch. The short
last batches of a part's shards are strung together and cut into blocks as well, so that all blocks
of a part but one have the same size, and the rows of a part alone tell how many it has.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mdm.data.manifest import Manifest
from mdm.data.manifest_parts import ShardPart, starts

Rows = NDArray[np.int64]


class PartLayout:
    """The blocks of one part; its rows are counted from its own first one."""

    def __init__(self, shard_rows: Rows, size: int) -> None:
        self.size = size
        self.shard_start = starts(shard_rows)  # first row of each shard
        self.full_start = starts(shard_rows // size)  # full batches before each shard
        self.tail_start = starts(shard_rows % size)  # rows in short batches before each shard
        self.full = int(self.full_start[-1])
        self.blocks = -(-int(self.shard_start[-1]) // size)

    def block(self, index: int) -> Rows:
        """Rows of a block."""
        if index < self.full:
            shard = int(np.searchsorted(self.full_start, index, side="right")) - 1
            first = self.shard_start[shard] + (index - self.full_start[shard]) * self.size
            return np.arange(first, first + self.size)
        tail = np.arange(
            (index - self.full) * self.size,
            min((index - self.full + 1) * self.size, int(self.tail_start[-1])),
        )
        shard_of = np.searchsorted(self.tail_start, tail, side="right") - 1
        short = self.shard_start[shard_of + 1] - self.tail_start[shard_of + 1]
        rows: Rows = short + tail
        return rows

    def block_of(self, row: int) -> int:
        """The block that holds a row."""
        shard = int(np.searchsorted(self.shard_start, row, side="right")) - 1
        batch = (row - int(self.shard_start[shard])) // self.size
        full = int(self.full_start[shard + 1] - self.full_start[shard])
        if batch < full:
            return int(self.full_start[shard]) + batch
        tail = row - int(self.shard_start[shard]) - full * self.size + int(self.tail_start[shard])
        return self.full + tail // self.size

    def locate(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """(shard of the part, record batch in it, row in the batch) of each row."""
        shards = np.searchsorted(self.shard_start, rows, side="right") - 1
        batches, within = np.divmod(rows - self.shard_start[shards], self.size)
        return shards, batches, within


class RowLayout:
    """The rows of a manifest. What lies in a part is known once that part has been fetched."""

    def __init__(self, manifest: Manifest) -> None:
        parts = manifest.shard_parts
        self.manifest = manifest
        self.size = manifest.batch_rows
        self.rows = manifest.rows
        self.parts = len(parts.infos)
        self.part_start = parts.row_start  # first row of each part, and the end
        self.part_rows = np.diff(parts.row_start)
        self._shard_start = parts.item_start

        def layout(number: int) -> PartLayout:
            part = parts.part(number)
            assert isinstance(part, ShardPart)
            return PartLayout(part.rows, self.size)

        self.part = lru_cache(maxsize=64)(layout)

    def part_of(self, row: int) -> int:
        """The part that holds a row."""
        return int(np.searchsorted(self.part_start, row, side="right")) - 1

    def block(self, part: int, index: int) -> Rows:
        """Row numbers of a block of a part."""
        rows: Rows = self.part_start[part] + self.part(part).block(index)
        return rows

    def locate(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """(shard, record batch in it, row in the batch) of each row number."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise ValueError(f"rows {rows.min()} to {rows.max()} of a data set of {self.rows} rows")
        if self.parts == 1:
            return self.part(0).locate(rows)
        shards, batches, within = (np.empty(len(rows), np.int64) for _ in range(3))
        parts = np.searchsorted(self.part_start, rows, side="right") - 1
        for number in np.unique(parts).tolist():
            at = np.flatnonzero(parts == number)
            found = self.part(number).locate(rows[at] - self.part_start[number])
            shards[at], batches[at], within[at] = found
            shards[at] += self._shard_start[number]
        return shards, batches, within
