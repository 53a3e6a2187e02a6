"""Which samples a step consumes: a pure function of (manifest, seed, step).

Never of rank or worker count: the ranks share one ordered global batch. Nothing is scanned: any
step is found by arithmetic, however many samples there are, and so are the steps of any sample.

    step -> stage -> task (exact quota) -> global slots -> source of each slot (exact quota)
         -> n-th sample of the source -> epoch -> pool of parts -> window of blocks -> row

An epoch of a source passes its parts in a permuted order, `POOL` of them at a time; the blocks of
a pool are permuted together, and the rows of W successive ones shuffled: little to fetch at a
time, well mixed all the same. A data set of at most `POOL` parts (30 million samples or so) is one
pool.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdm.data.layout import RowLayout, Rows
from mdm.data.manifest import Manifest
from mdm.data.manifest_parts import starts
from mdm.data.mixture import Mixture, Source
from mdm.data.shuffle import Permutation, key_of, shuffled
from mdm.utils.ranks import World

POOL = 16  # parts
TOGETHER = 16  # steps of a task drawn together at most: one costs hardly less than all


class _Epoch(NamedTuple):
    """In which order an epoch passes the parts."""

    parts: Rows  # their numbers
    turn_of: Rows  # the inverse: when each is passed
    pool_start: Rows  # first position of each pool of POOL parts, and the end


class _Pool:
    """Parts passed at the same time: their blocks permuted, then windows of their rows shuffled.

    Full blocks come first, so that windows begin at fixed places; the last window also takes the
    one block of each part that may be short.
    """

    def __init__(self, layout: RowLayout, parts: Rows, key: bytes, window: int) -> None:
        self.layout, self.parts, self.window = layout, parts, window
        full, rest = np.divmod(layout.part_rows[parts], layout.size)
        self.full_start = starts(full)  # full blocks before each part
        self.full = int(self.full_start[-1])
        self.short = [
            (part, blocks)
            for part, blocks, left in zip(parts.tolist(), full.tolist(), rest.tolist(), strict=True)
            if left
        ]
        self.windows = max(1, self.full // window)
        self.key = key
        self.blocks = Permutation(self.full, key)  # of the full ones

    def window_at(self, position: int) -> tuple[int, int]:
        """(window, place in it) of a position in the pool."""
        span = self.window * self.layout.size
        window = min(position // span, self.windows - 1)
        return window, position - window * span

    def rows(self, window: int) -> Rows:
        """The rows of a window, in the order in which they are used."""
        first = window * self.window
        last = self.full if window == self.windows - 1 else first + self.window
        blocks = [self._block(self.blocks.at(i)) for i in range(first, last)]
        if window == self.windows - 1:
            blocks += [self.layout.block(part, index) for part, index in self.short]
        found: Rows = np.concatenate(blocks)[
            shuffled(sum(map(len, blocks)), self.key, stream=1 + window)
        ]
        return found

    def _block(self, index: int) -> Rows:
        turn = int(np.searchsorted(self.full_start, index, side="right")) - 1
        return self.layout.block(int(self.parts[turn]), index - int(self.full_start[turn]))

    def window_of(self, turn: int, row: int) -> int:
        """The window that holds a row of the pool's part number `turn`."""
        part = int(self.parts[turn])
        block = self.layout.part(part).block_of(row - int(self.layout.part_start[part]))
        if block >= self.full_start[turn + 1] - self.full_start[turn]:
            return self.windows - 1
        place = self.blocks.source(int(self.full_start[turn]) + block)
        return min(place // self.window, self.windows - 1)


class SourceOrder:
    """The endless sequence of one source's rows, epoch after epoch, at random access."""

    def __init__(self, name: str, layout: RowLayout, seed: int, window: int) -> None:
        self.name = name
        self.layout = layout
        self.seed = seed
        self.window = window
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._pool = lru_cache(maxsize=4)(self._make_pool)
        self._window_rows = lru_cache(maxsize=8)(
            lambda epoch, pool, window: self._pool(epoch, pool).rows(window)
        )

    def rows(self, start: int, stop: int) -> tuple[Rows, Rows]:
        """(row numbers, epochs) of the source's samples number `start` to `stop`."""
        found: list[Rows] = []
        epochs: list[Rows] = []
        while start < stop:
            epoch, position = divmod(start, self.layout.rows)
            pools = self._epoch(epoch).pool_start
            pool = int(np.searchsorted(pools, position, side="right")) - 1
            window, first = self._pool(epoch, pool).window_at(position - int(pools[pool]))
            part = self._window_rows(epoch, pool, window)[first : first + stop - start]
            found.append(part)
            epochs.append(np.full(len(part), epoch, np.int64))
            start += len(part)
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(found), np.concatenate(epochs)

    def turn_of(self, row: int, epoch: int) -> int:
        """The number of the source's sample that is this row, in this epoch."""
        passed = self._epoch(epoch)
        pool, turn = divmod(int(passed.turn_of[self.layout.part_of(row)]), POOL)
        blocks = self._pool(epoch, pool)
        window = blocks.window_of(turn, row)
        place = int(np.flatnonzero(self._window_rows(epoch, pool, window) == row)[0])
        position = window * self.window * self.layout.size + place
        return epoch * self.layout.rows + int(passed.pool_start[pool]) + position

    def _make_epoch(self, epoch: int) -> _Epoch:
        parts = shuffled(self.layout.parts, key_of(self.seed, epoch, self.name))
        turn_of = np.empty_like(parts)
        turn_of[parts] = np.arange(len(parts))
        before = starts(self.layout.part_rows[parts])
        return _Epoch(parts, turn_of, np.append(before[:-1:POOL], before[-1]))

    def _make_pool(self, epoch: int, pool: int) -> _Pool:
        parts = self._epoch(epoch).parts[pool * POOL : (pool + 1) * POOL]
        key = key_of(self.seed, epoch, pool, self.name)
        return _Pool(self.layout, parts, key, self.window)


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
        return self.span(world.rank * part, (world.rank + 1) * part)

    def span(self, start: int, stop: int) -> "Draw":
        """The samples at the places `start` to `stop`: views, for reading alone."""
        own = slice(start, stop)
        return Draw(self.task, self.sources[own], self.rows[own], self.epochs[own], self.ids[own])

    def take(self, places: NDArray[np.int64]) -> "Draw":
        """The samples at these places."""
        ids = [self.ids[i] for i in places.tolist()]
        return Draw(self.task, self.sources[places], self.rows[places], self.epochs[places], ids)


class Order:
    """The order of a mixture under a seed."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture = mixture
        self.seed = seed
        self.sources = [
            SourceOrder(s.name, layout_of(s), seed, mixture.window) for s in mixture.sources
        ]
        self._together = lru_cache(maxsize=8)(self._draw_together)

    @cached_property
    def _before(self) -> list[NDArray[np.int64]]:
        """Samples of each source that were consumed before each stage."""
        mixture = self.mixture
        found = [np.zeros(len(mixture.sources), np.int64)]
        for shares, this, following in zip(
            mixture.shares, mixture.stages, mixture.stages[1:], strict=False
        ):
            found.append(found[-1] + shares.consumed(following.step - this.step))
        return found

    def consumed(self, step: int) -> NDArray[np.int64]:
        """Samples of each source that all steps before `step` consume."""
        stage = self.mixture.stage_at(step)
        inside = step - self.mixture.stages[stage].step
        return self._before[stage] + self.mixture.shares[stage].consumed(inside)

    def draw(self, step: int) -> Draw:
        """The global batch of `step`."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        mixture = self.mixture
        stage = mixture.stage_at(step)
        shares, inside = mixture.shares[stage], step - mixture.stages[stage].step
        turn = int(shares.steps.turns(inside, inside + 1)[0])
        task = shares.tasks[turn]
        size = mixture.slots(task)
        # Successive steps of a task take its successive slots.
        number, place = divmod(int(shares.steps.before(inside)[turn]), self._steps(task))
        return self._together(stage, turn, number).span(place * size, (place + 1) * size)

    def _steps(self, task: str) -> int:
        """How many steps are drawn together: those of a window, whose parts may be remote."""
        window = self.mixture.window * min(s.manifest.batch_rows for s in self.mixture.sources)
        return max(1, min(TOGETHER, window // self.mixture.slots(task)))

    def _draw_together(self, stage: int, turn: int, number: int) -> Draw:
        """Successive steps of a stage's task, the stage's end disregarded."""
        mixture = self.mixture
        shares = mixture.shares[stage]
        task = shares.tasks[turn]
        size = self._steps(task) * mixture.slots(task)
        first = number * size
        own, slots = shares.sources[task], shares.slots[task]
        turns = slots.turns(first, first + size)
        before = self._before[stage][own]
        begin, end = before + slots.before(first), before + slots.before(first + size)
        sources = np.array(own, np.int64)[turns]
        rows, epochs = np.empty(size, np.int64), np.empty(size, np.int64)
        for place, source in enumerate(own):
            taken = turns == place
            rows[taken], epochs[taken] = self.sources[source].rows(
                int(begin[place]), int(end[place])
            )
        names = [s.name for s in mixture.sources]
        ids = [f"{names[s]}:{r}" for s, r in zip(sources.tolist(), rows.tolist(), strict=True)]
        return Draw(task, sources, rows, epochs, ids)

    def uses(self, source: int, row: int, steps: int) -> Iterator[tuple[int, int]]:
        """(step, epoch) of each of the first `steps` steps that uses this row of a source."""
        order = self.sources[source]
        consumed = int(self.consumed(steps)[source])
        for epoch in range(-(-consumed // order.layout.rows)):
            turn = order.turn_of(row, epoch)
            if turn >= consumed:
                return
            before = [int(b[source]) for b in self._before]
            # The last stage that begins at or below this turn: those that rest begin where the
            # next one does.
            stage = max(k for k, first in enumerate(before) if first <= turn)
            inside = self.mixture.shares[stage].step_of(source, turn - before[stage])
            yield self.mixture.stages[stage].step + inside, epoch


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
    64 for a manifest without mixture. ValueError if the ranks cannot share it evenly, or where
    texts are packed: which rank reads a text depends on the lengths of all of the step's texts.
    """
    mixture = as_mixture(manifest, global_batch)
    world = world or World()
    check_world(mixture.global_batch, world)
    draw = _order(mixture, seed).draw(step)
    if world.size > 1 and draw.task == "text" and mixture.texts_per_row > 1:
        raise ValueError("texts are packed: ask for the step's ids without ranks")
    return draw.share(world).ids
