"""What encoding would write and how long it would take, estimated from a sample of the input.

Input units are surveyed as a whole, in the fixed shuffle of all, until they are enough. The first
samples of each are decoded, and one batch goes through the autoencoder. Everything else is scaled
by the units' bytes. Duplicates are counted only within the surveyed units: the whole set has at
least that share, so the forecast errs on the side of too much.
"""

import dataclasses
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mdm.data.schema import Samples, sample_schema, write_shard
from mdm.first_stage.tokenizer import Tokenizer
from mdm.preprocess.duplicates import DuplicateIndex
from mdm.preprocess.encoding import Chunk, decode_group
from mdm.preprocess.receipt import shard_cuts
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group, Survey, plan, survey, unit_order
from mdm.sources.record import Unit
from mdm.storage import StoreOptions

SAMPLE_SHARE = 20  # one unit in so many,
LEAST_RECORDS = 2000  # but at least so many records
DECODED = 512  # samples of each unit
_KEYS_A_PAGE = 1000  # of a listing


def predict(
    units: Sequence[Unit], recipe: Recipe, tokenizer: Tokenizer, autoencoder: str, cores: int
) -> dict[str, Any]:
    """Surveys, decodes and encodes a sample of the units; writes nothing.

    Returns the prediction, and what it is based on.

    Raises:
        ValueError: the surveyed units hold no record.
    """
    began = time.perf_counter()
    surveys: dict[int, Survey] = {}
    surveyed = 0  # records
    for number in unit_order(len(units)):
        if surveyed >= LEAST_RECORDS and len(surveys) * SAMPLE_SHARE >= len(units):
            break
        surveys[number] = survey(units[number], near=recipe.near_duplicates)
        surveyed += len(surveys[number])
    surveys = dict(sorted(surveys.items()))
    survey_seconds = time.perf_counter() - began
    if not surveyed:
        raise ValueError("the surveyed units hold no record: nothing can be predicted")
    totals, decode_seconds, chunks = _decode(
        [units[n] for n in surveys], list(surveys.values()), recipe, tokenizer
    )
    image_seconds = _image_seconds(chunks, recipe, autoencoder)

    sizes = [unit_bytes(unit) for unit in units]
    scale = surveyed / max(1, sum(sizes[n] for n in surveys))
    records = [
        len(surveys[n]) if n in surveys else round(sizes[n] * scale) for n in range(len(units))
    ]
    yielded = totals["samples"] / max(1, totals["records"])
    groups = plan(units, records, [{}] * len(units), recipe.shard_rows)
    records_of = {id(unit): count for unit, count in zip(units, records, strict=True)}
    rows = [round(yielded * sum(records_of[id(u)] for u in g.units)) for g in groups]
    shards = sum(len(shard_cuts(n, recipe)) for n in rows)
    shard_bytes, row_bytes = _bytes(chunks, recipe)
    size = round(shards * shard_bytes + sum(rows) * row_bytes)

    total = sum(records)
    share = total / max(1, totals["records"])
    quarantined = totals["quarantined"] * share
    seconds = survey_seconds * total / surveyed
    seconds += (decode_seconds + image_seconds * totals["images"]) * share
    return {
        "units": len(units),
        "units_sampled": len(surveys),
        "records": total,
        "examples": sum(rows),
        "quarantined": round(quarantined),
        "dropped": max(0, round(total * (1 - yielded) - quarantined)),
        "shards": shards,
        "bytes": size,
        "requests": _requests(len(units), len(groups), shards, size),  # without retries
        "hours": round(seconds / cores / 3600, 6),  # on `cores` as fast as this machine's
        "cores": cores,
    }


def unit_bytes(unit: Unit) -> int:
    """Input bytes of a unit for comparison with others of its data set: its range or its files."""
    if unit.stop:
        return max(1, unit.stop - unit.start)
    size = 0
    for name in unit.files:
        with suppress(OSError):
            size += os.path.getsize(Path(unit.root, name))
    return max(1, size)


def _decode(
    units: Sequence[Unit], surveys: Sequence[Survey], recipe: Recipe, tokenizer: Tokenizer
) -> tuple[Counter[str], float, list[Chunk]]:
    """The first DECODED samples of each unit: totals, seconds and chunks."""
    with (
        tempfile.TemporaryDirectory(prefix="mdm-plan-") as folder,
        DuplicateIndex(Path(folder), images=recipe.image_size is not None) as index,
    ):
        for number, surveyed in enumerate(surveys):
            index.add(number, surveyed)
        left_out = index.left_out(len(surveys))
    began = time.perf_counter()
    totals, chunks = Counter[str](), list[Chunk]()
    for unit, out in zip(units, left_out, strict=True):
        samples = 0
        for chunk in decode_group(Group(0, (unit,), (out,)), recipe, tokenizer):
            chunks.append(dataclasses.replace(chunk, card_samples=()))
            totals["records"] += chunk.counts["records"]
            totals["images"] += 0 if chunk.pixels is None else len(chunk.pixels)
            totals["quarantined"] += len(chunk.quarantine)
            samples += len(chunk.samples)
            if samples >= DECODED:
                break
        totals["samples"] += samples
    return totals, time.perf_counter() - began, chunks


def _image_seconds(chunks: Sequence[Chunk], recipe: Recipe, folder: str) -> float:
    """Core seconds that the autoencoder takes for an image."""
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
    """Bytes of an empty shard, and of each row with a sampled text and latents."""
    samples = Samples.concatenate([c.samples for c in chunks])
    if recipe.image_grid is not None:
        numbers = recipe.image_grid[0] * recipe.image_grid[1] * recipe.latent_dim
        samples = samples.take(np.arange(min(len(samples), 4 * recipe.batch_rows)))
        zeros = np.zeros((len(samples), numbers), np.uint16)
        samples = dataclasses.replace(samples, latents=zeros)
    schema = sample_schema(recipe.image_grid, recipe.latent_dim)
    empty = write_shard(samples.take(np.arange(0)), schema, recipe.batch_rows)[1].bytes
    size = write_shard(samples, schema, recipe.batch_rows)[1].bytes
    return empty, (size - empty) / max(1, len(samples))


def _requests(units: int, groups: int, shards: int, size: int) -> int:
    """Surveys and receipts are written, read or listed, and removed; shards are written."""
    part = StoreOptions.from_environment().part_bytes
    each = size / max(1, shards)
    uploads = shards * (1 if each <= part else 3 + -(-each // part))
    pages = -(-(units + groups + shards) // _KEYS_A_PAGE)
    # The lease, the card twice, the manifest with its hash, the first look-ups, the sweep.
    return round(uploads + 3 * units + 2 * groups + 4 * pages + 20)
