"""From a step to the records it used, and from a sample to the steps that use it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mdm.data import packing
from mdm.data.mixture import Mixture
from mdm.data.order import Draw, Order, layout_of
from mdm.data.reader import SourceReader
from mdm.data.schema import Rows


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
    pack: int | None = None  # row of the global batch that it shares with other texts


def locate(
    mixture: Mixture,
    ids: list[str],
    epochs: list[int] | None = None,
    packs: list[int] | None = None,
) -> list[Trace]:
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
        rows = _batch(readers[name], shard, batch)
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
                None if packs is None else packs[place],
            )
        )
    return found


def find(mixture: Mixture, record: str) -> list[str]:
    """Sample ids (`source:row`) of the record with this id or origin, by reading all data sets."""
    found = []
    for source in mixture.sources:
        reader = SourceReader(source)
        first = 0
        for shard, batch, info in source.manifest.batches():
            rows = reader.read(shard, [batch])[0]
            for i, names in enumerate(zip(rows.ids, rows.origins, strict=True)):
                if record in names:
                    found.append(f"{source.name}:{first + i}")
            first += info.rows
    return found


def packs_of(mixture: Mixture, draw: Draw, dialogue_length: int) -> list[int] | None:
    """The row of the global batch in which each sample of a step is packed; None unpacked."""
    if draw.task != "text" or mixture.texts_per_row == 1:
        return None
    readers = [SourceReader(s) for s in mixture.sources]
    lengths = [0] * len(draw.ids)
    for place, (source, row) in enumerate(
        zip(draw.sources.tolist(), draw.rows.tolist(), strict=True)
    ):
        at = layout_of(mixture.sources[source]).locate(np.array([row], np.int64))
        shard, batch, within = (int(v[0]) for v in at)
        text = _batch(readers[source], shard, batch).text(within)
        lengths[place] = min(len(text), dialogue_length)
    found = [0] * len(lengths)
    for number, pack in enumerate(packing.plan(lengths, dialogue_length, mixture.global_batch)):
        for place in pack:
            found[place] = number
    return found


@lru_cache(maxsize=64)
def _batch(reader: SourceReader, shard: int, batch: int) -> Rows:
    return reader.read(shard, [batch])[0]


def uses(mixture: Mixture, seed: int, sample: str, steps: int) -> Iterator[tuple[int, int]]:
    """(step, epoch) of each of the first `steps` steps that uses this sample, by arithmetic."""
    name, _, row = sample.rpartition(":")
    names = [s.name for s in mixture.sources]
    yield from Order(mixture, seed).uses(names.index(name), int(row), steps)
