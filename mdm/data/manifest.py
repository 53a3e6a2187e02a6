"""The commit record of an encoded data set: written last, immutable, identified by its sha256."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from mdm.data.schema import SCHEMA_VERSION, BatchInfo, ShardInfo, example_schema
from mdm.data.storage import MissingObjectError, Store, open_store

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.json.sha256"
CARD = "card.json"


class ManifestError(ValueError):
    """A manifest that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Quarantined:
    """A record that could not be encoded, why, and where it lies."""

    id: str
    reason: str
    origin: str


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
    shards: tuple[ShardInfo, ...]
    quarantine: tuple[Quarantined, ...]
    counts: dict[str, int]  # records, examples, dropped and quarantined by reason, truncated texts
    card_sha256: str
    schema_version: int = SCHEMA_VERSION
    location: str = field(default="", compare=False)  # where it was loaded from; not in the file

    def __post_init__(self) -> None:
        for shard in self.shards:
            if any(b.rows != self.batch_rows for b in shard.batches[:-1]) or (
                sum(b.rows for b in shard.batches) != shard.rows
            ):
                raise ManifestError(
                    f"shard {shard.key} is not {shard.rows} rows in batches of {self.batch_rows}"
                )

    @property
    def rows(self) -> int:
        """Examples in all shards."""
        return sum(s.rows for s in self.shards)

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
        plain = dataclasses.asdict(self)
        del plain["location"]
        for shard in plain["shards"]:
            shard["batches"] = [
                [b["offset"], b["length"], b["rows"], b["xxh3"]] for b in shard["batches"]
            ]
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
            expected = store.get(MANIFEST_SHA256).decode().split()[0]
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
        if (version := plain.get("schema_version")) != SCHEMA_VERSION:
            raise ManifestError(
                f"{location or 'the manifest'} has schema version {version}, this code reads "
                f"{SCHEMA_VERSION}: encode the data set again"
            )
        plain["shards"] = tuple(shard_from_json(s) for s in plain["shards"])
        plain["quarantine"] = tuple(Quarantined(**q) for q in plain["quarantine"])
        plain["class_names"] = tuple(plain["class_names"])
        if plain["image_grid"] is not None:
            plain["image_grid"] = tuple(plain["image_grid"])
        return Manifest(**plain, location=location)

    def batches(self) -> Iterator[tuple[int, int, BatchInfo]]:
        """(shard index, batch index, where it lies), in storage order."""
        for s, shard in enumerate(self.shards):
            for b, batch in enumerate(shard.batches):
                yield s, b, batch


def canonical(plain: Any) -> bytes:
    """Sorted, unspaced JSON with a newline."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"


def shard_from_json(plain: dict[str, Any]) -> ShardInfo:
    """A ShardInfo whose batches are `[offset, length, rows, xxh3]` lists."""
    batches = tuple(
        BatchInfo(**b) if isinstance(b, dict) else BatchInfo(*b) for b in plain["batches"]
    )
    return ShardInfo(**(plain | {"batches": batches}))


def publish(store: Store, manifest: Manifest) -> Manifest:
    """Commit `manifest`; ManifestError if another one was committed there before.

    The manifest itself is created only if absent: of two jobs one wins. The hash beside it comes
    after, so that a reader that finds both reads a finished data set.
    """
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
