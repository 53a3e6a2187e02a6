"""What encoding would write and how long it would take, from a sample of the input.

Units are surveyed whole, in the fixed shuffle of all, until they are enough; of each the first
examples are decoded, and one batch goes through the autoencoder. All else is in proportion to the
units' bytes. Duplicates are counted within the sample alone: the whole set has at least that share,
so the prediction errs on the side of too much.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdm.data.schema import Samples, sample_schema, write_shard
from mdm.first_stage.tokenizer import Tokenizer
from mdm.preprocess import duplicates
from mdm.preprocess.encoding import Chunk, decode_group
from mdm.preprocess.receipt import shard_cuts
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group, Survey, plan, survey, unit_order
from mdm.sources.record import Unit
from mdm.storage import StoreOptions

SAMPLE_SHARE = 20  # one unit in so many,
LEAST_RECORDS = 2000  # but at least so many records
DECODED = 512  # examples of each
_KEYS_A_PAGE = 1000  # of a listing


@dataclass(frozen=True)
class Forecast:
    """The prediction, and what it rests on."""

    units: int
    units_sampled: int
    records: int
    examples: int
    quarantined: int
    dropped: int
    shards: int
    bytes: int
    requests: int  # to the store, retries not counted
    hours: float  # with `cores` of this machine's speed
    cores: int

    def to_json(self) -> dict[str, Any]:
        """As the job prints it."""
        return dataclasses.asdict(self) | {"hours": round(self.hours, 4)}


@dataclass
class _Sampled:
    """Totals over what was decoded."""

    records: int = 0
    examples: int = 0
    images: int = 0
    quarantined: int = 0
    seconds: float = 0.0


def predict(
    units: Sequence[Unit], recipe: Recipe, tokenizer: Tokenizer, autoencoder: str, cores: int
) -> Forecast:
    """Survey, decode and encode a sample; nothing is written."""
    began = time.perf_counter()
    surveys: dict[int, Survey] = {}
    for number in unit_order(len(units)):
        enough = sum(len(s) for s in surveys.values()) >= LEAST_RECORDS
        if enough and len(surveys) * SAMPLE_SHARE >= len(units):
            break
        surveys[number] = survey(units[number], near=recipe.near_duplicates)
    surveys = dict(sorted(surveys.items()))
    chosen = list(surveys)
    survey_seconds = time.perf_counter() - began
    if not sum(len(s) for s in surveys.values()):
        raise ValueError("the sampled units hold not one record: nothing can be predicted")
    totals, chunks = _decode([units[n] for n in chosen], list(surveys.values()), recipe, tokenizer)
    encode_seconds = _time_a_batch(chunks, recipe, autoencoder)  # an image

    sizes = [unit_bytes(unit) for unit in units]
    scale = sum(len(s) for s in surveys.values()) / max(1, sum(sizes[n] for n in chosen))
    records = [
        len(surveys[n]) if n in surveys else round(sizes[n] * scale) for n in range(len(units))
    ]
    grown = sum(records) / max(1, sum(len(s) for s in surveys.values()))
    yielded = totals.examples / max(1, totals.records)
    groups = plan(units, records, [{}] * len(units), recipe.shard_rows)
    numbers = {id(unit): n for n, unit in enumerate(units)}
    rows = [round(yielded * sum(records[numbers[id(u)]] for u in g.units)) for g in groups]
    shards = sum(len(shard_cuts(n, recipe)) for n in rows)
    a_shard, a_row = _bytes(chunks, recipe)
    size = round(shards * a_shard + sum(rows) * a_row)

    share = sum(records) / max(1, totals.records)
    seconds = (
        survey_seconds * grown + totals.seconds * share + encode_seconds * totals.images * share
    ) / cores
    return Forecast(
        units=len(units),
        units_sampled=len(surveys),
        records=sum(records),
        examples=sum(rows),
        quarantined=round(totals.quarantined * share),
        dropped=max(0, round(sum(records) * (1 - yielded) - totals.quarantined * share)),
        shards=shards,
        bytes=size,
        requests=_requests(len(units), len(groups), shards, size),
        hours=seconds / 3600,
        cores=cores,
    )


def unit_bytes(unit: Unit) -> int:
    """Input bytes that tell units of one data set apart: of its range, or of its files."""
    if unit.stop:
        return max(1, unit.stop - unit.start)
    return max(1, sum(_size(Path(unit.root, name)) for name in unit.files))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _decode(
    units: Sequence[Unit], surveys: Sequence[Survey], recipe: Recipe, tokenizer: Tokenizer
) -> tuple[_Sampled, list[Chunk]]:
    """What the first DECODED examples of each unit came to."""
    with tempfile.TemporaryDirectory(prefix="mdm-plan-") as folder:
        images = recipe.image_size is not None
        left_out = duplicates.left_out(surveys, Path(folder), images=images)
    totals, kept = _Sampled(), list[Chunk]()
    for unit, out in zip(units, left_out, strict=True):
        began, examples = time.perf_counter(), 0
        for chunk in decode_group(Group(0, (unit,), (out,)), recipe, tokenizer):
            kept.append(dataclasses.replace(chunk, samples=()))
            totals.records += chunk.counts["records"]
            totals.images += 0 if chunk.pixels is None else len(chunk.pixels)
            totals.quarantined += len(chunk.quarantine)
            examples += len(chunk.examples)
            if examples >= DECODED:
                break
        totals.examples += examples
        totals.seconds += time.perf_counter() - began
    return totals, kept


def _time_a_batch(chunks: Sequence[Chunk], recipe: Recipe, folder: str) -> float:
    """Seconds that the autoencoder takes for an image, its thread time counted as cores."""
    if recipe.image_size is None or not any(c.pixels is not None for c in chunks):
        return 0.0
    import torch

    from mdm.first_stage.autoencoder import Autoencoder

    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.encoder_threads)
    model = Autoencoder.load(folder, recipe.device)
    size = recipe.image_size
    batch = torch.zeros(recipe.encode_batch, 3, size, size, dtype=torch.uint8)
    model.encode(batch)
    began = time.perf_counter()
    model.encode(batch).cpu()
    seconds = (time.perf_counter() - began) * recipe.encoder_threads
    torch.set_num_threads(threads)
    return seconds / recipe.encode_batch


def _bytes(chunks: Sequence[Chunk], recipe: Recipe) -> tuple[float, float]:
    """Bytes of an empty shard, and of each row of the sampled texts; latents are of one size."""
    examples = Samples.concatenate([c.examples for c in chunks])
    if recipe.image_grid is not None:
        numbers = recipe.image_grid[0] * recipe.image_grid[1] * recipe.latent_dim
        examples = examples.take(np.arange(min(len(examples), 4 * recipe.batch_rows)))
        zeros = np.zeros((len(examples), numbers), np.uint16)
        examples = dataclasses.replace(examples, latents=zeros)
    schema = sample_schema(recipe.image_grid, recipe.latent_dim)
    empty = write_shard(examples.take(np.arange(0)), schema, recipe.batch_rows)[1].bytes
    if not len(examples):
        return empty, 0.0
    return empty, (write_shard(examples, schema, recipe.batch_rows)[1].bytes - empty) / len(
        examples
    )


def _requests(units: int, groups: int, shards: int, size: int) -> int:
    """Surveys and receipts are written, read or listed, and removed; shards are written."""
    part = StoreOptions.from_environment().part_bytes
    each = size / max(1, shards)
    uploads = shards * (1 if each <= part else 3 + -(-each // part))
    pages = -(-(units + groups + shards) // _KEYS_A_PAGE)
    # The lease, the card twice, the manifest with its hash, what is looked for first, the sweep.
    return round(uploads + 3 * units + 2 * groups + 4 * pages + 20)
