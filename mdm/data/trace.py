"""From a step to the records it used, and from a sample to the steps that use it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mdm.data import packing
from mdm.data.mixture import Mixture
from mdm.data.order import Draw, SampleOrder, layout_of
from mdm.data.reader import SourceReader
from mdm.data.schema import RecordBatch


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
    pack: int | None = None  # row of the global batch that it shares with other samples


def locate(
    mixture: Mixture,
    ids: list[str],
    epochs: list[int] | None = None,
    packs: list[int] | None = None,
) -> list[Trace]:
    """Traces of sample ids (`source:row`), read from their shards.

    Raises:
        ValueError: the mixture has no such sample.
    """
    readers = [SourceReader(s) for s in mixture.sources]
    traces = []
    for place, sample in enumerate(ids):
        reader = readers[source_of(mixture, sample)]
        shard, number, row = _place(reader, int(sample.rpartition(":")[2]))
        info, batch = reader.manifest.shards[shard], _batch(reader, shard, number)
        traces.append(
            Trace(
                sample,
                batch.ids[row],
                batch.origins[row],
                reader.store.uri,
                info.key,
                number,
                row,
                info.batches[number].xxh3,
                None if epochs is None else epochs[place],
                None if packs is None else packs[place],
            )
        )
    return traces


def source_of(mixture: Mixture, sample: str) -> int:
    """Index of the source of a sample id; ValueError if the mixture has no such sample."""
    name, _, row = sample.rpartition(":")
    names = [s.name for s in mixture.sources]
    if name not in names or not row.isdigit():
        raise ValueError(
            f"no sample {sample!r}; ids are source:row with a source of {', '.join(names)}"
        )
    return names.index(name)


def find(mixture: Mixture, record: str) -> list[str]:
    """Sample ids (`source:row`) of the record with this id or origin; reads all data sets."""
    ids = []
    for source in mixture.sources:
        reader = SourceReader(source)
        first = 0
        for shard, number, info in source.manifest.batches():
            batch = reader.read(shard, [number])[0]
            for i, names in enumerate(zip(batch.ids, batch.origins, strict=True)):
                if record in names:
                    ids.append(f"{source.name}:{first + i}")
            first += info.rows
    return ids


def packs_of(mixture: Mixture, draw: Draw, length: int) -> list[int] | None:
    """The row of the global batch that holds each sample of a step; None if it is not packed.

    `length` is the longest text of the step's task.
    """
    if mixture.per_row(draw.task) == 1:
        return None
    readers = [SourceReader(s) for s in mixture.sources]
    lengths = []
    for source, row in zip(draw.sources.tolist(), draw.rows.tolist(), strict=True):
        shard, number, within = _place(readers[source], row)
        text = _batch(readers[source], shard, number).text(within)
        lengths.append(min(len(text), length))
    row_of = [0] * len(lengths)
    beside = packing.beside(mixture.image_grid if draw.task == "image_text" else None)
    for number, pack in enumerate(packing.plan(lengths, length, mixture.global_batch, beside)):
        for place in pack:
            row_of[place] = number
    return row_of


def _place(reader: SourceReader, row: int) -> tuple[int, int, int]:
    shard, batch, within = layout_of(reader.source).locate(np.array([row], np.int64))
    return int(shard[0]), int(batch[0]), int(within[0])


@lru_cache(maxsize=64)
def _batch(reader: SourceReader, shard: int, batch: int) -> RecordBatch:
    return reader.read(shard, [batch])[0]


def uses(mixture: Mixture, seed: int, sample: str, steps: int) -> Iterator[tuple[int, int]]:
    """(step, epoch) of each of the first `steps` steps that uses this sample."""
    row = int(sample.rpartition(":")[2])
    yield from SampleOrder(mixture, seed).uses(source_of(mixture, sample), row, steps)
