"""The commit record of an encoded data set: written last, immutable, identified by its sha256.

It names the parts in which its shards and its quarantine lie (`parts.py`): opening it costs the
same for a thousand samples as for 10^10, but for 80 bytes a part of about two million.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from mdm.data.manifest_parts import ManifestError as ManifestError
from mdm.data.manifest_parts import (
    PartInfo,
    PartList,
    ShardPart,
    StoredParts,
    decode_quarantine,
    quarantine_parts,
    shard_parts,
)
from mdm.data.manifest_parts import Quarantined as Quarantined
from mdm.data.manifest_parts import canonical as canonical
from mdm.data.schema import BatchInfo, ShardInfo, example_schema
from mdm.storage import MissingObjectError, Store, open_store

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.json.sha256"
CARD = "card.json"
MANIFEST_VERSION = 2


@dataclass(frozen=True)
class Manifest:
    """Everything needed to read an encoded data set, and what it was made from."""

    dataset: str
    split: str
    recipe_hash: str
    tokenizer_sha256: str
    autoencoder_sha256: str | None  # None for text alone
    image_grid: tuple[int, int] | None  # rows, columns of image tokens
    latent_dim: int  # 0 for text alone
    vocab_size: int
    class_names: tuple[str, ...]
    batch_rows: int  # of every record batch but a shard's last
    shards: Sequence[ShardInfo]  # held in parts, whatever is given
    quarantine: Sequence[Quarantined]  # in parts too
    counts: dict[str, int]  # records, examples, dropped and quarantined by reason, truncated texts
    card_sha256: str
    schema_version: int = MANIFEST_VERSION
    location: str = field(default="", compare=False)  # where it was loaded from; not in the file

    def __post_init__(self) -> None:
        # ManifestError for shards that do not fit batch_rows.
        if not isinstance(self.shards, PartList):
            object.__setattr__(self, "shards", shard_parts(self.shards, self.batch_rows))
        if not isinstance(self.quarantine, PartList):
            object.__setattr__(self, "quarantine", quarantine_parts(self.quarantine))

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def shard_parts(self) -> PartList[ShardInfo]:
        """`shards`, as the list in parts that it is."""
        assert isinstance(self.shards, PartList)
        return self.shards

    @property
    def quarantine_parts(self) -> PartList[Quarantined]:
        """`quarantine`, as the list in parts that it is."""
        assert isinstance(self.quarantine, PartList)
        return self.quarantine

    @property
    def rows(self) -> int:
        """Examples in all shards."""
        return int(self.shard_parts.row_start[-1])

    @property
    def task(self) -> str:
        """`image_text` or `text`: what a batch of this data set trains."""
        return "text" if self.image_grid is None else "image_text"

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of its shards."""
        return example_schema(self.image_grid, self.latent_dim)

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same manifest is the same bytes."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del plain["location"]
        plain["shards"] = self.shard_parts.infos
        plain["quarantine"] = self.quarantine_parts.infos
        return canonical(plain)

    @cached_property
    def sha256(self) -> str:
        """Identity of the data set: of exactly these bytes in exactly this order."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def store(self) -> Store:
        """The store that holds its shards."""
        return open_store(self.location)

    @staticmethod
    def load(uri: str) -> "Manifest":
        """The manifest of the data set encoded at `uri`.

        ManifestError if there is none, encoding did not finish, its hash or version is wrong.
        """
        uri = uri.removesuffix("/" + MANIFEST)
        store = open_store(uri)
        try:
            data = store.get(MANIFEST)
        except MissingObjectError:
            raise ManifestError(
                f"{uri} holds no encoded data set ({MANIFEST} is missing): has encode.py finished?"
            ) from None
        try:
            # Damaged, it is no hash at all, which is refused below.
            expected = (store.get(MANIFEST_SHA256).decode(errors="replace").split() or ["none"])[0]
        except MissingObjectError:
            raise ManifestError(
                f"{uri} lacks {MANIFEST_SHA256}: encode.py was stopped at its last step, run it "
                "once more"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise ManifestError(f"{uri}/{MANIFEST} has sha256 {found}, expected {expected}")
        return Manifest.from_bytes(data, location=uri)

    @staticmethod
    def from_bytes(data: bytes, location: str = "") -> "Manifest":
        """The manifest that `to_bytes` wrote; ManifestError for another version."""
        plain: dict[str, Any] = json.loads(data)
        if (version := plain.get("schema_version")) != MANIFEST_VERSION:
            raise ManifestError(
                f"{location or 'the manifest'} has schema version {version}, this code reads "
                f"{MANIFEST_VERSION}: encode the data set again"
            )
        fetch = StoredParts(location)
        for name, decode in (("shards", ShardPart.decode), ("quarantine", decode_quarantine)):
            infos = (PartInfo(*info) for info in plain[name])
            plain[name] = PartList(infos, decode, fetch)
        plain["class_names"] = tuple(plain["class_names"])
        if plain["image_grid"] is not None:
            plain["image_grid"] = tuple(plain["image_grid"])
        return Manifest(**plain, location=location)

    def objects(self) -> Iterator[str]:
        """Keys of all objects of the data set."""
        yield from (MANIFEST, MANIFEST_SHA256, CARD)
        yield from (i.key for i in self.shard_parts.infos)
        yield from (i.key for i in self.quarantine_parts.infos)
        yield from (s.key for s in self.shards)

    def batches(self) -> Iterator[tuple[int, int, BatchInfo]]:
        """(shard index, batch index, where it lies), in storage order."""
        for s, shard in enumerate(self.shards):
            for b, batch in enumerate(shard.batches):
                yield s, b, batch


def shard_from_json(plain: dict[str, Any]) -> ShardInfo:
    """A ShardInfo whose batches are `[offset, length, rows, xxh3]` lists."""
    batches = tuple(
        BatchInfo(**b) if isinstance(b, dict) else BatchInfo(*b) for b in plain["batches"]
    )
    return ShardInfo(**(plain | {"batches": batches}))


def publish(store: Store, manifest: Manifest) -> Manifest:
    """Commit `manifest`; ManifestError if another one was committed there before.

    Its parts come before. The manifest itself is created only if absent: of two jobs one wins. The
    hash beside it comes after, so that a reader that finds both reads a finished data set.
    """
    manifest.shard_parts.write(store)
    manifest.quarantine_parts.write(store)
    data = manifest.to_bytes()
    if not store.put(MANIFEST, data, if_absent=True):
        there = store.get(MANIFEST)
        if there != data:
            other = Manifest.from_bytes(there)
            raise ManifestError(
                f"{store.uri} was meanwhile published by another job: its recipe is "
                f"{other.recipe_hash}, this one's {manifest.recipe_hash}"
            )
    commit(store, manifest)
    return dataclasses.replace(manifest, location=store.uri)


def commit(store: Store, manifest: Manifest) -> None:
    """Write the hash beside a manifest that is there: the mark of a finished data set."""
    store.put(MANIFEST_SHA256, f"{manifest.sha256}  {MANIFEST}\n".encode())
