"""Small real data sets for tests, published and encoded, and what encoding needs."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mdm.data.manifest import CARD, Manifest, canonical, publish
from mdm.data.manifest_parts import (
    PART_SHARDS,
    PartList,
    ShardPart,
    StoredParts,
    quarantine_parts,
    shard_parts,
)
from mdm.data.schema import BatchInfo, Samples, ShardInfo, sample_schema, write_shard
from mdm.first_stage import autoencoder
from mdm.first_stage.tokenizer import EOS, train_model
from mdm.storage import open_store

NAMES = ("one", "two", "three", "four")


def write_tokenizer(path: Path) -> Path:
    lines = [f"{a} {b} and {c}, my friend" for a in NAMES for b in NAMES for c in NAMES]
    lines += [f"hello {a}, how are you?" for a in NAMES]
    path.write_bytes(train_model(lines, 32))
    return path


def write_autoencoder(folder: Path) -> Path:
    torch.manual_seed(0)
    model = autoencoder.build(16, channels=(8, 8, 8))
    autoencoder.save(model, folder, [0.0] * 4, [1.0] * 4)
    return folder


def write_imagenet(root: Path, per_class: int) -> Path:
    """Noise images in ImageNet's folders; `NAMES` are the classes."""
    random = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        wnid = f"n{label:08d}"
        folder = root / "train" / wnid
        folder.mkdir(parents=True)
        with open(root / "LOC_synset_mapping.txt", "a") as mapping:
            mapping.write(f"{wnid} {name}\n")
        for i in range(per_class):
            (folder / f"{wnid}_{i}.JPEG").write_bytes(jpeg(random))
    return root


def jpeg(random: np.random.Generator) -> bytes:
    file = io.BytesIO()
    pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_ultrachat(root: Path, dialogues: Sequence[Sequence[str]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"id": str(i), "data": list(d)}) for i, d in enumerate(dialogues)]
    (root / "train.jsonl").write_text("\n".join(rows) + "\n")
    return root


def samples(rows: int, *, images: bool = True, seed: int = 0) -> Samples:
    random = np.random.default_rng(seed)
    return Samples(
        [f"record {seed}-{i}" for i in range(rows)],
        [f"file {i}" for i in range(rows)],
        random.integers(-1, 4, rows).astype(np.int32),
        [
            np.array([*random.integers(5, 60, random.integers(0, 9)), EOS], np.uint16)
            for _ in range(rows)
        ],
        np.zeros(rows, np.uint16),
        random.integers(0, 0x7F00, (rows, 4 * 16)).astype(np.uint16) if images else None,
    )


def encoded(
    uri: str,
    shard_rows: Sequence[int],
    *,
    images: bool = True,
    batch_rows: int = 8,
    part_shards: int = 256,
) -> Manifest:
    """A published data set of random samples, with real shards and hashes."""
    store = open_store(uri)
    grid = (2, 2) if images else None
    schema = sample_schema(grid, 16)
    shards = []
    for number, rows in enumerate(shard_rows):
        data, info = write_shard(samples(rows, images=images, seed=number), schema, batch_rows)
        store.put(info.key, data)
        shards.append(info)
    card = canonical({})
    store.put(CARD, card)
    parts = shard_parts(shards, batch_rows, size=part_shards)
    return publish(store, manifest_of(parts, batch_rows, grid, hashlib.sha256(card).hexdigest()))


def planned(
    shard_rows: Sequence[int],
    *,
    images: bool = True,
    batch_rows: int = 8,
    part_shards: int = 256,
) -> Manifest:
    """A manifest of this shape without shards, for tests of the sample order only."""
    shards = [planned_shard(n, rows, batch_rows) for n, rows in enumerate(shard_rows)]
    parts = shard_parts(shards, batch_rows, size=part_shards)
    return manifest_of(parts, batch_rows, (2, 2) if images else None)


def planned_shard(number: int, rows: int, batch_rows: int) -> ShardInfo:
    """A shard that is not stored, with record batches of one kilobyte per row."""
    batches = tuple(
        BatchInfo(
            1024 * first,
            1024 * min(batch_rows, rows - first),
            min(batch_rows, rows - first),
            f"{number << 20 | first:016x}",
        )
        for first in range(0, rows, batch_rows)
    )
    return ShardInfo(f"shards/{number}", rows, 1024 * rows, f"{number:064x}", batches)


def vast(uri: str, rows: int, *, batch_rows: int = 64, shard_rows: int = 8192) -> Manifest:
    """A published manifest of this many rows in real parts, without shards.

    All full parts are one object, because their content is equal and determines their name.
    """
    store = open_store(uri)
    per_part = PART_SHARDS * shard_rows
    parts_by_rows = {}
    for part_rows in (per_part, rows % per_part):
        shards = (
            planned_shard(n, min(shard_rows, part_rows - n * shard_rows), batch_rows)
            for n in range(-(-part_rows // shard_rows))
        )
        parts_by_rows[part_rows] = shard_parts(shards, batch_rows, store)
    infos = parts_by_rows[per_part].infos * (rows // per_part)
    infos += parts_by_rows[rows % per_part].infos
    parts = PartList(infos, ShardPart.decode, StoredParts(store.uri))
    return publish(store, manifest_of(parts, batch_rows, (2, 2)))


def manifest_of(
    shards: PartList[ShardInfo],
    batch_rows: int,
    grid: tuple[int, int] | None,
    card_sha256: str = "",
) -> Manifest:
    return Manifest(
        dataset="noise",
        split="train",
        recipe_hash="recipe",
        tokenizer_sha256="tokenizer",
        autoencoder_sha256="autoencoder" if grid else None,
        image_grid=grid,
        latent_dim=16 if grid else 0,
        vocab_size=60,
        class_names=NAMES,
        batch_rows=batch_rows,
        shards=shards,
        quarantine=quarantine_parts(),
        counts={"examples": int(shards.row_start[-1]), "quarantined": 0},
        card_sha256=card_sha256,
    )
