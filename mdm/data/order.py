"""Which samples a step consumes: a pure function of (manifest, seed, step).

It never depends on rank or worker count: the ranks share one ordered global batch. Nothing is
scanned: the samples of any step and the steps of any sample are computed, whatever their number.

    step -> mixture stage -> task (exact quota) -> global slots -> source of each slot (exact quota)
         -> n-th sample of the source -> epoch -> shuffle pool of parts -> shuffle window -> row

An epoch of a source passes its manifest parts in a permuted order, `POOL_PARTS` of them at a time.
The batches of such a shuffle pool (see `layout.py`) are permuted together, and the rows of each
window of `shuffle_window` batches are shuffled. Few parts are needed at a time, and the samples are
well mixed. A data set of at most `POOL_PARTS` parts (about 30 million samples) is one pool.
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

POOL_PARTS = 16
TOGETHER = 16  # at most so many steps of a task are drawn together: one costs hardly less than all


class _Epoch(NamedTuple):
    """In which order an epoch passes the parts."""

    parts: Rows  # part numbers
    turn_of: Rows  # the inverse: when each part is passed
    pool_start: Rows  # first position of each shuffle pool, and the end


class _ShufflePool:
    """Parts passed together: their batches are permuted, then windows of rows are shuffled.

    Full batches come first, so that windows begin at fixed positions; the last window also takes
    the one batch of each part that may be short.
    """

    def __init__(self, layout: RowLayout, parts: Rows, key: bytes, window: int) -> None:
        self.layout, self.parts, self.key, self.window = layout, parts, key, window
        full, rest = np.divmod(layout.part_rows[parts], layout.size)
        self.full_start = starts(full)  # full batches before each part
        self.full = int(self.full_start[-1])
        self.short = list(zip(parts[rest > 0].tolist(), full[rest > 0].tolist(), strict=True))
        self.last = max(1, self.full // window) - 1  # number of the last window
        self.batches = Permutation(self.full, key)  # of the full ones

    def window_at(self, position: int) -> tuple[int, int]:
        """(window, offset in it) of a position in the pool."""
        rows = self.window * self.layout.size
        window = min(position // rows, self.last)
        return window, position - window * rows

    def rows(self, window: int) -> Rows:
        """The rows of a window, in the order in which they are used."""
        first = window * self.window
        end = self.full if window == self.last else first + self.window
        batches = [self._batch(self.batches.at(i)) for i in range(first, end)]
        if window == self.last:
            batches += [self.layout.batch(part, index) for part, index in self.short]
        order = shuffled(sum(map(len, batches)), self.key, stream=1 + window)
        rows: Rows = np.concatenate(batches)[order]
        return rows

    def _batch(self, index: int) -> Rows:
        turn = int(np.searchsorted(self.full_start, index, side="right")) - 1
        return self.layout.batch(int(self.parts[turn]), index - int(self.full_start[turn]))

    def window_of(self, turn: int, row: int) -> int:
        """The window that holds a row of the pool's `turn`-th part."""
        part = int(self.parts[turn])
        batch = self.layout.part(part).batch_of(row - int(self.layout.part_start[part]))
        if batch >= self.full_start[turn + 1] - self.full_start[turn]:
            return self.last
        place = self.batches.source(int(self.full_start[turn]) + batch)
        return min(place // self.window, self.last)


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
        rows, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        while start < stop:
            epoch, position = divmod(start, self.layout.rows)
            pools = self._epoch(epoch).pool_start
            pool = int(np.searchsorted(pools, position, side="right")) - 1
            window, first = self._pool(epoch, pool).window_at(position - int(pools[pool]))
            rows.append(self._window_rows(epoch, pool, window)[first : first + stop - start])
            epochs.append(np.full(len(rows[-1]), epoch, np.int64))
            start += len(rows[-1])
        return np.concatenate(rows), np.concatenate(epochs)

    def turn_of(self, row: int, epoch: int) -> int:
        """The number of the source's sample that is this row in this epoch."""
        passed = self._epoch(epoch)
        part = int(np.searchsorted(self.layout.part_start, row, side="right")) - 1
        pool, turn = divmod(int(passed.turn_of[part]), POOL_PARTS)
        window = self._pool(epoch, pool).window_of(turn, row)
        place = int(np.flatnonzero(self._window_rows(epoch, pool, window) == row)[0])
        position = window * self.window * self.layout.size + place
        return epoch * self.layout.rows + int(passed.pool_start[pool]) + position

    def _make_epoch(self, epoch: int) -> _Epoch:
        parts = shuffled(self.layout.parts, key_of(self.seed, epoch, self.name))
        before = starts(self.layout.part_rows[parts])
        return _Epoch(parts, np.argsort(parts), np.append(before[:-1:POOL_PARTS], before[-1]))

    def _make_pool(self, epoch: int, pool: int) -> _ShufflePool:
        parts = self._epoch(epoch).parts[pool * POOL_PARTS : (pool + 1) * POOL_PARTS]
        key = key_of(self.seed, epoch, pool, self.name)
        return _ShufflePool(self.layout, parts, key, self.window)


@dataclass(frozen=True)
class Draw:
    """The ordered global batch of one step: B samples of one task."""

    task: str
    sources: NDArray[np.int64]  # [B] index into the mixture's sources
    rows: NDArray[np.int64]  # [B] row numbers in the source
    epochs: NDArray[np.int64]  # [B]
    ids: list[str]  # B of them: source:row

    def share(self, world: World) -> "Draw":
        """The contiguous share of one rank."""
        size = len(self.ids) // world.size
        return self.take(slice(world.rank * size, (world.rank + 1) * size))

    def take(self, places: slice | NDArray[np.int64]) -> "Draw":
        """The samples at these places; those of a slice are views, not to be written."""
        if isinstance(places, slice):
            ids = self.ids[places]
        else:
            ids = [self.ids[i] for i in places.tolist()]
        return Draw(self.task, self.sources[places], self.rows[places], self.epochs[places], ids)


class SampleOrder:
    """The sample order of a mixture under a seed."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture = mixture
        self.seed = seed
        self.sources = [
            SourceOrder(s.name, layout_of(s), seed, mixture.shuffle_window) for s in mixture.sources
        ]
        self._together = lru_cache(maxsize=8)(self._draw_together)

    @cached_property
    def _before(self) -> list[NDArray[np.int64]]:
        """Samples of each source that were consumed before each mixture stage."""
        mixture = self.mixture
        before = [np.zeros(len(mixture.sources), np.int64)]
        for shares, this, following in zip(
            mixture.shares, mixture.stages, mixture.stages[1:], strict=False
        ):
            before.append(before[-1] + shares.consumed(following.step - this.step))
        return before

    def consumed(self, step: int) -> NDArray[np.int64]:
        """i64 [sources]: samples of each source that all steps before `step` consume."""
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
        # Consecutive steps of a task take its consecutive slots.
        number, place = divmod(int(shares.steps.before(inside)[turn]), self._steps(task))
        return self._together(stage, turn, number).take(slice(place * size, (place + 1) * size))

    def _steps(self, task: str) -> int:
        """How many steps are drawn together: those of one window, whose parts may be remote."""
        batch_rows = min(s.manifest.batch_rows for s in self.mixture.sources)
        window_rows = self.mixture.shuffle_window * batch_rows
        return max(1, min(TOGETHER, window_rows // self.mixture.slots(task)))

    def _draw_together(self, stage: int, turn: int, number: int) -> Draw:
        """Consecutive steps of a task in a mixture stage, ignoring where the stage ends."""
        mixture = self.mixture
        shares = mixture.shares[stage]
        task = shares.tasks[turn]
        size = self._steps(task) * mixture.slots(task)
        first = number * size
        of_task, slots = shares.sources[task], shares.slots[task]
        turns = slots.turns(first, first + size)
        before = self._before[stage][of_task]
        begin, end = before + slots.before(first), before + slots.before(first + size)
        sources = np.array(of_task, np.int64)[turns]
        rows, epochs = np.empty(size, np.int64), np.empty(size, np.int64)
        for place, source in enumerate(of_task):
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
        before = [int(b[source]) for b in self._before]
        for epoch in range(-(-consumed // order.layout.rows)):
            turn = order.turn_of(row, epoch)
            if turn >= consumed:
                return
            # The last stage that begins at or below this turn: a stage that does not read the
            # source begins where the next one does.
            stage = max(k for k, first in enumerate(before) if first <= turn)
            inside = self.mixture.shares[stage].step_of(source, turn - before[stage])
            yield self.mixture.stages[stage].step + inside, epoch


@lru_cache(maxsize=16)
def layout_of(source: Source) -> RowLayout:
    """The layout of a source's manifest, built once."""
    return RowLayout(source.manifest)


_order = lru_cache(maxsize=8)(SampleOrder)


def check_world(global_batch: int, world: World) -> None:
    """ValueError unless the ranks can share a global batch evenly."""
    if global_batch % world.size:
        raise ValueError(
            f"global batch {global_batch} is not divisible by {world.size} ranks: choose a multiple"
        )


def sample_ids(
    manifest: Manifest | Mixture,
    seed: int,
    step: int,
    world: World | None = None,
    *,
    global_batch: int | None = None,
) -> list[str]:
    """Ids (`source:row`) of the samples that `world.rank` consumes at `step`, in order.

    The concatenation of the ranks' lists is the same for every world size. For a manifest instead
    of a mixture, `global_batch` defaults to 64.

    Raises:
        ValueError: the ranks cannot share the batch evenly, or samples are packed. Which rank reads
            a packed sample depends on the lengths of all texts of the step.
    """
    if isinstance(manifest, Manifest):
        mixture = Mixture((Source(manifest.dataset, manifest),), global_batch=global_batch or 64)
    else:
        mixture = manifest
    if global_batch not in (None, mixture.global_batch):
        raise ValueError(
            f"global_batch is {global_batch} but the mixture's is {mixture.global_batch}"
        )
    world = world or World()
    check_world(mixture.global_batch, world)
    draw = _order(mixture, seed).draw(step)
    if world.size > 1 and mixture.per_row(draw.task) > 1:
        raise ValueError("samples are packed: ask for the step's ids without ranks")
    return draw.share(world).ids
