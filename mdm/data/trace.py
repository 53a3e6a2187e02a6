"""From a step to the records it used, and from a sample to the steps that use it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mdm.data.mixture import Mixture
from mdm.data.order import Order, layout_of
from mdm.data.reader import SourceReader


@dataclass(frozen=True)
class Trace:
    """Where a sample lies and what it was made from."""

    id: str  # source:row
    record: str  # the record's id in its data set
    origin: str
    uri: str  # of the data set
    shard: str
    batch: int
    row: int  # in the batch
    xxh3: str  # of the batch
    epoch: int | None = None


def locate(mixture: Mixture, ids: list[str], epochs: list[int] | None = None) -> list[Trace]:
    """Traces of sample ids (`source:row`), read from their shards.

    ValueError for an id that the mixture does not have.
    """
    readers = {s.name: SourceReader(s) for s in mixture.sources}
    by_name = {s.name: s for s in mixture.sources}
    found = []
    for place, sample in enumerate(ids):
        name, _, row = sample.rpartition(":")
        if name not in by_name or not row.isdigit():
            raise ValueError(
                f"no sample {sample!r}; ids are source:row with a source of {', '.join(by_name)}"
            )
        shard, batch, within = (
            int(v[0]) for v in layout_of(by_name[name]).locate(np.array([int(row)], np.int64))
        )
        info = by_name[name].manifest.shards[shard]
        rows = readers[name].read(shard, [batch])[0]
        found.append(
            Trace(
                sample,
                rows.ids[within],
                rows.origins[within],
                readers[name].store.uri,
                info.key,
                batch,
                within,
                info.batches[batch].xxh3,
                None if epochs is None else epochs[place],
            )
        )
    return found


def find(mixture: Mixture, record: str) -> list[str]:
    """Sample ids (`source:row`) of the record with this id in its data set, by reading them all."""
    found = []
    for source in mixture.sources:
        reader = SourceReader(source)
        first = 0
        for shard, batch, info in source.manifest.batches():
            ids = reader.read(shard, [batch])[0].ids
            found += [f"{source.name}:{first + i}" for i, name in enumerate(ids) if name == record]
            first += info.rows
    return found


def uses(mixture: Mixture, seed: int, sample: str, steps: int) -> Iterator[tuple[int, int]]:
    """(step, epoch) of each of the first `steps` steps that uses this sample."""
    order = Order(mixture, seed)
    for step in range(steps):
        draw = order.draw(step)
        if sample in draw.ids:
            yield step, int(draw.epochs[draw.ids.index(sample)])
