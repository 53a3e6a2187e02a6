"""Re-reading an encoded data set: every byte, every count, every row."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdm.data.manifest import CARD, Manifest
from mdm.data.manifest_parts import PartList
from mdm.data.schema import RecordBatch, ShardInfo, checksum, from_bfloat16_bits
from mdm.first_stage.tokenizer import EOS
from mdm.preprocess.publish import unnamed
from mdm.storage import Store, StoreError


@dataclass(frozen=True)
class Verdict:
    """One object of the data set, and what is wrong with it, if anything."""

    key: str
    rows: int
    bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()  # worth saying, and no damage


def verify(manifest: Manifest) -> Iterator[Verdict]:
    """A verdict on each part of the manifest, each shard, the card, and the set as a whole."""
    store = manifest.store()
    for number, info in enumerate(manifest.shards.infos):
        problems = tuple(_part(manifest.shards, number))
        yield Verdict(info.key, info.rows, 0, problems)
        for shard in () if problems else manifest.shards.part(number):
            yield Verdict(shard.key, shard.rows, shard.bytes, tuple(_shard(store, manifest, shard)))
    for number, info in enumerate(manifest.quarantine.infos):
        yield Verdict(info.key, 0, 0, tuple(_part(manifest.quarantine, number)))
    yield Verdict(CARD, 0, 0, tuple(_card(store, manifest)))
    leftovers, others = unnamed_in(store, manifest)
    problems = (*_counts(manifest), *(f"{key} belongs to no data set" for key in leftovers))
    notes = tuple(f"{key} belongs to no data set; it is left alone" for key in others)
    yield Verdict("the set", manifest.rows, 0, problems, notes)


def _part(parts: PartList[Any], number: int) -> Iterator[str]:
    try:
        parts.part(number)
    except StoreError as error:
        yield f"{error}: what it lists cannot be checked"


def _shard(store: Store, manifest: Manifest, shard: ShardInfo) -> Iterator[str]:
    try:
        data = store.get(shard.key)
    except StoreError as error:
        yield str(error)
        return
    if len(data) != shard.bytes:
        yield f"{len(data)} bytes, the manifest says {shard.bytes}"
    found = hashlib.sha256(data).hexdigest()
    if found != shard.sha256:
        yield f"sha256 is {found}, the manifest says {shard.sha256}"
    for number, batch in enumerate(shard.batches):
        part = data[batch.offset : batch.offset + batch.length]
        if (found := checksum(part)) != batch.xxh3:
            yield f"record batch {number}: xxh3 is {found}, the manifest says {batch.xxh3}"
            continue
        rows = RecordBatch(part, manifest.schema)
        if len(rows) != batch.rows:
            yield f"record batch {number}: {len(rows)} rows, the manifest says {batch.rows}"
        for problem in _rows(rows, manifest):
            yield f"record batch {number}: {problem}"


def _rows(rows: RecordBatch, manifest: Manifest) -> Iterator[str]:
    lengths = np.diff(rows.offsets)
    if (lengths < 1).any():
        yield "a text without tokens"
    elif (rows.tokens[rows.offsets[1:] - 1] != EOS).any():
        yield "a text without EOS at its end"
    if len(rows.tokens) and int(rows.tokens.max()) >= manifest.vocab_size:
        yield f"token {rows.tokens.max()} of a vocabulary of {manifest.vocab_size}"
    if (rows.prompt_lengths >= lengths).any():
        yield "a prompt as long as its text"
    classes = rows.class_ids
    if manifest.class_names and ((classes < -1) | (classes >= len(manifest.class_names))).any():
        yield f"a class beyond the {len(manifest.class_names)} named ones"
    if rows.latents is not None and not np.isfinite(from_bfloat16_bits(rows.latents)).all():
        yield "a latent is not finite"


def _card(store: Store, manifest: Manifest) -> Iterator[str]:
    if not manifest.card_sha256:
        return  # published without one
    try:
        found = hashlib.sha256(store.get(CARD)).hexdigest()
    except StoreError as error:
        yield str(error)
        return
    if found != manifest.card_sha256:
        yield f"sha256 is {found}, the manifest says {manifest.card_sha256}"


def _counts(manifest: Manifest) -> Iterator[str]:
    counts, quarantined = manifest.counts, len(manifest.quarantine)
    if manifest.rows != counts["examples"]:
        yield f"shards hold {manifest.rows} examples, the counts say {counts['examples']}"
    if quarantined != counts.get("quarantined", 0):
        yield f"{quarantined} in quarantine, the counts say {counts.get('quarantined', 0)}"


def unnamed_in(store: Store, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Leftovers and what does no harm (see `unnamed`); none while a part is lost."""
    sizes = store.listing()
    try:
        return unnamed(manifest, sizes)
    except StoreError:
        return [], []


def discard(manifest: Manifest, damaged: Sequence[Verdict]) -> list[str]:
    """Delete what is damaged, and leftovers; encoding once more then writes back what is lost."""
    store = manifest.store()
    there = store.listing()
    keys = [v.key for v in damaged if v.key in there] + unnamed_in(store, manifest)[0]
    for key in keys:
        store.delete(key)
    return keys
