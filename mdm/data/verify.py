"""Re-reading an encoded data set: every byte, every count, every row."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdm.data.lease import LEASE
from mdm.data.manifest import CARD, Manifest
from mdm.data.parts import PartList
from mdm.data.publish import receipts_of
from mdm.data.schema import Rows, ShardInfo, checksum, from_bfloat16_bits
from mdm.data.storage import Store, StoreError
from mdm.data.tokenizer import EOS


@dataclass(frozen=True)
class Verdict:
    """One object of the data set, and what is wrong with it, if anything."""

    key: str
    rows: int
    bytes: int
    problems: tuple[str, ...]


def verify(manifest: Manifest) -> Iterator[Verdict]:
    """A verdict on each part of the manifest, each shard, the card, and the set as a whole."""
    store = manifest.store()
    for number, info in enumerate(manifest.shard_parts.infos):
        problems = tuple(_part(manifest.shard_parts, number))
        yield Verdict(info.key, info.rows, 0, problems)
        for shard in () if problems else manifest.shard_parts.part(number):
            yield Verdict(shard.key, shard.rows, shard.bytes, tuple(_shard(store, manifest, shard)))
    for number, info in enumerate(manifest.quarantine_parts.infos):
        yield Verdict(info.key, 0, 0, tuple(_part(manifest.quarantine_parts, number)))
    yield Verdict(CARD, 0, 0, tuple(_card(store, manifest)))
    yield Verdict("the set", manifest.rows, 0, tuple(_whole(store, manifest)))


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
        rows = Rows(part, manifest.schema)
        if len(rows) != batch.rows:
            yield f"record batch {number}: {len(rows)} rows, the manifest says {batch.rows}"
        for problem in _rows(rows, manifest):
            yield f"record batch {number}: {problem}"


def _rows(rows: Rows, manifest: Manifest) -> Iterator[str]:
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
    try:
        found = hashlib.sha256(store.get(CARD)).hexdigest()
    except StoreError as error:
        yield str(error)
        return
    if found != manifest.card_sha256:
        yield f"sha256 is {found}, the manifest says {manifest.card_sha256}"


def _whole(store: Store, manifest: Manifest) -> Iterator[str]:
    counts = manifest.counts
    if manifest.rows != counts["examples"]:
        yield f"shards hold {manifest.rows} examples, the counts say {counts['examples']}"
    if len(manifest.quarantine) != counts["quarantined"]:
        yield f"{len(manifest.quarantine)} in quarantine, the counts say {counts['quarantined']}"
    for key in strangers(store, manifest):
        yield f"{key} belongs to no data set"


def strangers(store: Store, manifest: Manifest) -> list[str]:
    """Keys of what the data set neither names nor keeps to itself; none while a part is lost."""
    own = (receipts_of(manifest), CARD.removesuffix(".json"), LEASE)
    try:
        named = set(manifest.objects())
    except StoreError:
        return []
    return [k for k in store.listing() if k not in named and not k.startswith(own)]


def discard(manifest: Manifest, damaged: Sequence[Verdict]) -> list[str]:
    """Delete what is damaged, and strangers; encoding once more then writes back what is lost."""
    store = manifest.store()
    there = store.listing()
    keys = [v.key for v in damaged if v.key in there] + strangers(store, manifest)
    for key in keys:
        store.delete(key)
    return keys
