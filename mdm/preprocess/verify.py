"""Re-reading an encoded data set: every byte, every count, every row."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from mdm.data.manifest import CARD, MANIFEST, MANIFEST_SHA256, Manifest, ManifestError
from mdm.data.manifest_parts import PartList
from mdm.data.schema import RecordBatch, ShardInfo, checksum, from_bfloat16_bits
from mdm.first_stage.tokenizer import EOS
from mdm.preprocess.publish import unnamed
from mdm.storage import Store, StoreError, open_store
from mdm.storage.lease import hold

NOTES = 10  # foreign objects that are named


@dataclass(frozen=True)
class Verdict:
    """One object of the data set and its problems, if any."""

    key: str
    rows: int
    bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()  # remarks that are no damage


def verify(manifest: Manifest) -> Iterator[Verdict]:
    """A verdict on each manifest part, each shard, the card, and the set as a whole."""
    store = manifest.store()
    for number, info in enumerate(manifest.shards.infos):
        problems = _part(manifest.shards, number)
        yield Verdict(info.key, info.rows, 0, problems)
        for shard in () if problems else manifest.shards.part(number):
            yield Verdict(shard.key, shard.rows, shard.bytes, tuple(_shard(store, manifest, shard)))
    for number, info in enumerate(manifest.quarantine.infos):
        yield Verdict(info.key, 0, 0, _part(manifest.quarantine, number))
    yield Verdict(CARD, 0, 0, tuple(_card(store, manifest)))
    leftovers, harmless = _unnamed(store, manifest)
    problems = (*_counts(manifest), *(f"{key} belongs to no data set" for key in leftovers))
    notes = tuple(f"{key} belongs to no data set; it is left alone" for key in harmless)
    yield Verdict("the set", manifest.rows, 0, problems, notes)


def _part(parts: PartList[Any], number: int) -> tuple[str, ...]:
    try:
        parts.part(number)
    except StoreError as error:
        return (f"{error}: what it lists cannot be checked",)
    return ()


def _shard(store: Store, manifest: Manifest, shard: ShardInfo) -> Iterator[str]:
    try:
        data = store.get(shard.key)
    except StoreError as error:
        yield str(error)
        return
    if len(data) != shard.bytes:
        yield f"{len(data)} bytes, the manifest says {shard.bytes}"
    if (sha256 := hashlib.sha256(data).hexdigest()) != shard.sha256:
        yield f"sha256 is {sha256}, the manifest says {shard.sha256}"
    for number, info in enumerate(shard.batches):
        part = data[info.offset : info.offset + info.length]
        if (xxh3 := checksum(part)) != info.xxh3:
            yield f"record batch {number}: xxh3 is {xxh3}, the manifest says {info.xxh3}"
            continue
        batch = RecordBatch(part, manifest.schema)
        if len(batch) != info.rows:
            yield f"record batch {number}: {len(batch)} rows, the manifest says {info.rows}"
        for problem in _rows(batch, manifest):
            yield f"record batch {number}: {problem}"


def _rows(batch: RecordBatch, manifest: Manifest) -> Iterator[str]:
    lengths = np.diff(batch.offsets)
    if (lengths < 1).any():
        yield "a text without tokens"
    elif (batch.tokens[batch.offsets[1:] - 1] != EOS).any():
        yield "a text without EOS at its end"
    if len(batch.tokens) and int(batch.tokens.max()) >= manifest.vocab_size:
        yield f"token {batch.tokens.max()} of a vocabulary of {manifest.vocab_size}"
    if (batch.prompt_lengths >= lengths).any():
        yield "a prompt as long as its text"
    classes = batch.class_ids
    if manifest.class_names and ((classes < -1) | (classes >= len(manifest.class_names))).any():
        yield f"a class beyond the {len(manifest.class_names)} named ones"
    if batch.latents is not None and not np.isfinite(from_bfloat16_bits(batch.latents)).all():
        yield "a latent is not finite"


def _card(store: Store, manifest: Manifest) -> Iterator[str]:
    if not manifest.card_sha256:
        return  # published without a card
    try:
        sha256 = hashlib.sha256(store.get(CARD)).hexdigest()
    except StoreError as error:
        yield str(error)
        return
    if sha256 != manifest.card_sha256:
        yield f"sha256 is {sha256}, the manifest says {manifest.card_sha256}"


def _counts(manifest: Manifest) -> Iterator[str]:
    samples, quarantined = manifest.counts["examples"], manifest.counts.get("quarantined", 0)
    if manifest.rows != samples:
        yield f"shards hold {manifest.rows} samples, the counts say {samples}"
    if len(manifest.quarantine) != quarantined:
        yield f"{len(manifest.quarantine)} in quarantine, the counts say {quarantined}"


def _unnamed(store: Store, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Leftovers and harmless objects (see `unnamed`); none while a manifest part is lost."""
    try:
        return unnamed(manifest, store.listing())
    except StoreError:
        return [], []


def repeat_hint(uri: str) -> str:
    """What a message adds where no data set lies at `uri`."""
    return " (give several data sets by repeating --data)" if "," in uri else ""


def report(uri: str, discard_damaged: bool, show: Callable[[str], None]) -> int:
    """Check one data set and return the number of problems.

    Args:
        uri: Folder or s3:// prefix of the data set.
        discard_damaged: Whether to delete what is damaged or belongs to no data set, and a
            manifest that cannot be read. Encoding again then writes back what is lost.
        show: Takes the lines for the user.
    """
    try:
        manifest = Manifest.load(uri)
    except ManifestError as error:
        show(f"  BAD {error}{repeat_hint(uri)}")
        if discard_damaged:  # the receipts give the same manifest again
            with hold(open_store(uri), "verify.py --discard", advice="discard later"):
                for key in (MANIFEST, MANIFEST_SHA256):
                    open_store(uri).delete(key)
        return 1
    show(
        f"{uri}: {manifest.dataset}/{manifest.split}, {manifest.rows} examples, "
        f"{len(manifest.quarantine)} in quarantine, manifest {manifest.sha256[:16]}"
    )
    problems = 0
    damaged = []
    total = len(manifest.shards) + len(manifest.parts()) + 2
    for verdict in tqdm(verify(manifest), "verify", total, unit=" objects", leave=False):
        problems += len(verdict.problems)
        damaged += [verdict] if verdict.problems else []
        size = f"{verdict.rows:>9} rows {verdict.bytes / 2**20:>9.2f} MiB"
        show(f"  {'BAD' if verdict.problems else 'ok ':<3} {size}  {verdict.key}")
        for line in (*verdict.problems, *verdict.notes[:NOTES]):
            show(f"      {line}")
        if len(verdict.notes) > NOTES:
            show(f"      {len(verdict.notes) - NOTES} more such objects")
    if discard_damaged:
        store = manifest.store()
        with hold(store, "verify.py --discard", advice="discard later"):
            present = store.listing()
            keys = [v.key for v in damaged if v.key in present] + _unnamed(store, manifest)[0]
            for key in keys:
                store.delete(key)
            for key in keys:
                show(f"  deleted {key}")
    return problems
