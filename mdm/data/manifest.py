"""The commit record of an encoded data set: written last, immutable, identified by its sha256.

It names the manifest parts that hold its shards and its quarantine (`manifest_parts.py`). Opening
it costs the same for a thousand samples as for 10^10, apart from 80 bytes per part of about two
million samples.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from mdm.data.manifest_parts import ManifestError as ManifestError
from mdm.data.manifest_parts import PartInfo, PartList, ShardPart, StoredParts, decode_quarantine
from mdm.data.manifest_parts import Quarantined as Quarantined
from mdm.data.manifest_parts import canonical as canonical
from mdm.data.schema import BatchInfo, ShardInfo, sample_schema
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
    shards: PartList[ShardInfo]
    quarantine: PartList[Quarantined]
    counts: dict[str, int]  # records, samples, dropped and quarantined by reason, truncated texts
    card_sha256: str
    schema_version: int = MANIFEST_VERSION
    location: str = field(default="", compare=False)  # where it was loaded from; not in the file

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def rows(self) -> int:
        """Samples in all shards."""
        return int(self.shards.row_start[-1])

    @property
    def task(self) -> str:
        """`image_text` or `text`: what a batch of this data set trains."""
        return "text" if self.image_grid is None else "image_text"

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of its shards."""
        return sample_schema(self.image_grid, self.latent_dim)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests have equal bytes."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del plain["location"]
        plain |= {"shards": self.shards.infos, "quarantine": self.quarantine.infos}
        return canonical(plain)

    @cached_property
    def sha256(self) -> str:
        """Identity of the data set: exactly these bytes in exactly this order."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def store(self) -> Store:
        """The store that holds its shards."""
        return open_store(self.location)

    @staticmethod
    def load(uri: str) -> "Manifest":
        """The manifest of the data set encoded at `uri`.

        Raises:
            ManifestError: it is missing, encoding did not finish, or its hash or version is wrong.
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
            # A damaged file holds no hash, and is refused below.
            expected = (store.get(MANIFEST_SHA256).decode(errors="replace").split() or ["none"])[0]
        except MissingObjectError:
            raise ManifestError(
                f"{uri} lacks {MANIFEST_SHA256}: encode.py was stopped at its last step, run it "
                "once more"
            ) from None
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != expected:
            raise ManifestError(f"{uri}/{MANIFEST} has sha256 {sha256}, expected {expected}")
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
        for name, decode in (("shards", ShardPart.decode), ("quarantine", decode_quarantine)):
            infos = (PartInfo(*info) for info in plain[name])
            plain[name] = PartList(infos, decode, StoredParts(location))
        plain["class_names"] = tuple(plain["class_names"])
        if plain["image_grid"] is not None:
            plain["image_grid"] = tuple(plain["image_grid"])
        return Manifest(**plain, location=location)

    def parts(self) -> list[str]:
        """Keys of its manifest parts."""
        return [info.key for info in (*self.shards.infos, *self.quarantine.infos)]

    def objects(self) -> list[str]:
        """Keys of all objects of the data set."""
        shards = (shard.key for shard in self.shards)
        return [MANIFEST, MANIFEST_SHA256, CARD, *self.parts(), *shards]

    def batches(self) -> Iterator[tuple[int, int, BatchInfo]]:
        """(shard index, batch index, where it lies), in storage order."""
        for s, shard in enumerate(self.shards):
            for b, batch in enumerate(shard.batches):
                yield s, b, batch


def publish(store: Store, manifest: Manifest) -> Manifest:
    """Commits `manifest`; ManifestError if a different one was committed there before.

    Its parts are written first. The manifest itself is created only if absent, so one of two jobs
    wins. Its hash is written last: a reader that sees both reads a finished data set.
    """
    manifest.shards.write(store)
    manifest.quarantine.write(store)
    data = manifest.to_bytes()
    if not store.put(MANIFEST, data, if_absent=True):
        present = store.get(MANIFEST)
        if present != data:
            raise ManifestError(
                f"{store.uri} was meanwhile published by another job: its recipe is "
                f"{Manifest.from_bytes(present).recipe_hash}, this one's {manifest.recipe_hash}"
            )
    commit(store, manifest)
    return dataclasses.replace(manifest, location=store.uri)


def commit(store: Store, manifest: Manifest) -> None:
    """Writes the hash of a published manifest: the mark of a finished data set."""
    store.put(MANIFEST_SHA256, f"{manifest.sha256}  {MANIFEST}\n".encode())
