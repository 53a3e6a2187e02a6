"""Which samples a step consumes: a pure function of (manifest, seed, step).

Never of rank or worker count: the ranks share one ordered global batch. Nothing is scanned: any
step is found by arithmetic, however many samples there are.

    step -> task (exact quota) -> global slots -> source of each slot (exact quota)
         -> n-th sample of the source -> (epoch, position) -> row

In a source, an epoch visits its record batches in a permuted order, and shuffles the rows of W
successive ones: little to fetch at a time, well mixed all the same.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from mdm.data.manifest import Manifest
from mdm.data.mixture import QUOTA_BLOCK, Mixture, Source, interleave
from mdm.dist import World

Rows = NDArray[np.int64]


class RowLayout:
    """Rows of one manifest, numbered through in storage order, in blocks of `batch_rows`.

    A block is a full record batch. The short last batches of the shards are strung together and
    cut into blocks as well, so that all blocks but one have the same size.
    """

    def __init__(self, manifest: Manifest) -> None:
        size = manifest.batch_rows
        rows = np.array([s.rows for s in manifest.shards], np.int64)
        self.size = size
        self.rows = int(rows.sum())
        self.shard_start = _cumulative(rows)  # first row of each shard
        self.full_start = _cumulative(rows // size)  # full batches before each shard
        self.tail_start = _cumulative(rows % size)  # rows in short batches before each shard
        self.full = int(self.full_start[-1])
        self.blocks = -(-self.rows // size)

    def block(self, index: int) -> Rows:
        """Row numbers of a block."""
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

    def locate(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """(shard, record batch in it, row in the batch) of each row number."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise ValueError(f"rows {rows.min()} to {rows.max()} of a data set of {self.rows} rows")
        shards = np.searchsorted(self.shard_start, rows, side="right") - 1
        batches, within = np.divmod(rows - self.shard_start[shards], self.size)
        return shards, batches, within


def _cumulative(values: Rows) -> Rows:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])


class SourceOrder:
    """The endless sequence of one source's rows, epoch after epoch, at random access."""

    def __init__(self, name: str, layout: RowLayout, seed: int, window: int) -> None:
        self.name = name
        self.layout = layout
        self.seed = seed
        self.window = window
        self._window_rows = lru_cache(maxsize=4)(self._make_window)

    def rows(self, start: int, stop: int) -> tuple[Rows, Rows]:
        """(row numbers, epochs) of the source's samples number `start` to `stop`."""
        found: list[Rows] = []
        epochs: list[Rows] = []
        span = self.window * self.layout.size
        while start < stop:
            epoch, position = divmod(start, self.layout.rows)
            window, first = divmod(position, span)
            part = self._window_rows(epoch, window)[first : first + stop - start]
            found.append(part)
            epochs.append(np.full(len(part), epoch, np.int64))
            start += len(part)
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(found), np.concatenate(epochs)

    def _make_window(self, epoch: int, window: int) -> Rows:
        first = window * self.window
        blocks = range(first, min(first + self.window, self.layout.blocks))
        key = _key(self.seed, self.name, epoch)
        # The one block that may be short ends every epoch, so that windows start at fixed places.
        n = self.layout.blocks - 1
        rows = np.concatenate(
            [self.layout.block(permute(i, n, key) if i < n else i) for i in blocks]
        )
        shuffled: Rows = np.random.Generator(
            np.random.Philox(key=int.from_bytes(key, "little"), counter=window)
        ).permutation(rows)
        return shuffled


def _key(seed: int, name: str, epoch: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=16).digest()


def permute(index: int, n: int, key: bytes) -> int:
    """Where a keyed permutation of range(n) sends `index`, without making the permutation.

    A Feistel network over the next even power of two, walked along its cycle until it is below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            mixed = hashlib.blake2b(
                right.to_bytes(8, "little") + bytes([turn]), digest_size=8, key=key
            ).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        index = left << half | right
        if index < n:
            return index


@dataclass(frozen=True)
class Draw:
    """The ordered global batch of one step: B samples of one task."""

    task: str
    sources: NDArray[np.int64]  # [B] index into the mixture's sources
    rows: NDArray[np.int64]  # [B] row numbers in the source
    epochs: NDArray[np.int64]  # [B]
    ids: list[str]  # B of them: source:row

    def share(self, world: World) -> "Draw":
        """The contiguous part of one rank."""
        part = len(self.ids) // world.size
        own = slice(world.rank * part, (world.rank + 1) * part)
        return Draw(self.task, self.sources[own], self.rows[own], self.epochs[own], self.ids[own])


class Order:
    """The order of a mixture under a seed."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture = mixture
        self.seed = seed
        self.sources = [
            SourceOrder(s.name, layout_of(s), seed, mixture.window) for s in mixture.sources
        ]

    @cached_property
    def _tasks(self) -> dict[str, tuple[list[int], "Interleaving"]]:
        """Task -> its sources' indices and how they take turns over its slots."""
        found = {}
        for task in self.mixture.tasks:
            own = [i for i, s in enumerate(self.mixture.sources) if s.manifest.task == task]
            quota = self.mixture.quotas(own)
            found[task] = (own, Interleaving(quota))
        return found

    @cached_property
    def _steps(self) -> "Interleaving":
        """How the tasks take turns over the steps."""
        return Interleaving(self.mixture.task_quotas)

    def draw(self, step: int) -> Draw:
        """The global batch of `step`."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        size = self.mixture.global_batch
        turn = int(self._steps.turns(step, step + 1)[0])
        task = self.mixture.tasks[turn]
        first = int(self._steps.before(step)[turn]) * size
        own, slots = self._tasks[task]
        turns = slots.turns(first, first + size)
        starts, stops = slots.before(first), slots.before(first + size)
        sources = np.array(own, np.int64)[turns]
        rows, epochs = np.empty(size, np.int64), np.empty(size, np.int64)
        for place, source in enumerate(own):
            taken = turns == place
            rows[taken], epochs[taken] = self.sources[source].rows(
                int(starts[place]), int(stops[place])
            )
        names = [s.name for s in self.mixture.sources]
        ids = [f"{names[s]}:{r}" for s, r in zip(sources.tolist(), rows.tolist(), strict=True)]
        return Draw(task, sources, rows, epochs, ids)


class Interleaving:
    """Turns taken in fixed proportion: each block of QUOTA_BLOCK has its exact quota of each."""

    def __init__(self, quotas: tuple[int, ...]) -> None:
        self.quotas = np.array(quotas, np.int64)
        self.block = interleave(quotas)  # [QUOTA_BLOCK] whose turn it is
        taken = self.block[:, None] == np.arange(len(quotas))
        self.taken = np.concatenate([np.zeros((1, len(quotas)), np.int64), taken.cumsum(0)])

    def turns(self, start: int, stop: int) -> NDArray[np.int64]:
        """Whose turn slots `start` to `stop` are."""
        turns: NDArray[np.int64] = self.block[np.arange(start, stop) % QUOTA_BLOCK]
        return turns

    def before(self, slot: int) -> NDArray[np.int64]:
        """How many turns each has had before `slot`."""
        block, within = divmod(slot, QUOTA_BLOCK)
        count: NDArray[np.int64] = block * self.quotas + self.taken[within]
        return count


@lru_cache(maxsize=16)
def layout_of(source: Source) -> RowLayout:
    """The layout of a source's manifest, made once."""
    return RowLayout(source.manifest)


@lru_cache(maxsize=8)
def _order(mixture: Mixture, seed: int) -> Order:
    return Order(mixture, seed)


def check_world(global_batch: int, world: World) -> None:
    """ValueError unless the ranks can share a global batch evenly."""
    if global_batch % world.size:
        raise ValueError(
            f"global batch {global_batch} is not divisible by {world.size} ranks: choose a multiple"
        )


def as_mixture(data: Manifest | Mixture, global_batch: int | None = None) -> Mixture:
    """A single data set as a mixture of one."""
    if isinstance(data, Mixture):
        if global_batch not in (None, data.global_batch):
            raise ValueError(
                f"global_batch is {global_batch} but the mixture's is {data.global_batch}"
            )
        return data
    return Mixture((Source(data.dataset, data, 1.0),), global_batch=global_batch or 64)


def sample_ids(
    manifest: Manifest | Mixture,
    seed: int,
    step: int,
    world: World | None = None,
    *,
    global_batch: int | None = None,
) -> list[str]:
    """Ids (`source:row`) of the samples that `world.rank` consumes at `step`, in order.

    The ranks' lists, one after the other, are the same for every world size. `global_batch` is
    64 for a manifest without mixture. ValueError if the ranks cannot share it evenly.
    """
    mixture = as_mixture(manifest, global_batch)
    world = world or World()
    check_world(mixture.global_batch, world)
    return _order(mixture, seed).draw(step).share(world).ids
