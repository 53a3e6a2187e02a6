"""What a finished group leaves behind: shards, then a receipt that says what is in them.

Objects in `work/` carry a checksum of their own, because not every path checks that of the storage.
"""

import base64
import dataclasses
import io
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from mdm.data.manifest import Quarantined, canonical
from mdm.data.schema import BatchInfo, ShardInfo
from mdm.preprocess.recipe import Recipe
from mdm.storage import MissingObjectError, Store

log = logging.getLogger("mdm")

# Among the counts: the pieces of all texts, without marks, and how many of them are unknown.
TEXT_TOKENS, UNKNOWN_TOKENS = "text tokens", "unknown tokens"
SAMPLES = 12  # that a dataset card shows
_SMALL = 64  # pixels: larger images are shown as JPEG


@dataclass(frozen=True)
class CardSample:
    """A sample for the dataset card, which shows those of the lowest `rank`, a hash of the id."""

    rank: int
    id: str
    text: str
    image: str  # base64 of a PNG or JPEG file; "" for text alone

    @staticmethod
    def of(sample_id: str, text: str, pixels: NDArray[np.uint8] | None) -> "CardSample":
        """The card's version of a sample; `pixels` are [3, H, W]."""
        file = io.BytesIO()
        if pixels is not None:
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            if max(image.size) <= _SMALL:
                image.save(file, "PNG", optimize=True)
            else:
                image.save(file, "JPEG", quality=85)
        encoded = base64.b64encode(file.getvalue()).decode()
        return CardSample(sample_rank(sample_id), sample_id, text, encoded)


def sample_rank(sample_id: str) -> int:
    """A pseudo-random but fixed number: the card shows samples of the lowest rank."""
    return xxhash.xxh3_64_intdigest(sample_id.encode("utf-8", "backslashreplace")) >> 11


def lowest(samples: Iterable[CardSample]) -> tuple[CardSample, ...]:
    """The SAMPLES samples of lowest rank."""
    return tuple(sorted(samples, key=lambda s: (s.rank, s.id))[:SAMPLES])


@dataclass(frozen=True)
class Receipt:
    """A finished group: its shards are written."""

    shards: tuple[ShardInfo, ...]
    quarantine: tuple[Quarantined, ...]
    counts: dict[str, int]
    token_lengths: dict[str, int]  # length -> texts
    classes: dict[str, int]  # class id -> samples
    samples: tuple[CardSample, ...] = ()

    def to_bytes(self) -> bytes:
        """As its object holds it, before it is sealed."""
        return canonical(dataclasses.asdict(self))

    @staticmethod
    def from_bytes(data: bytes) -> "Receipt":
        """The receipt that `to_bytes` wrote."""
        plain: dict[str, Any] = json.loads(data)
        for shard in plain["shards"]:
            shard["batches"] = tuple(BatchInfo(**batch) for batch in shard["batches"])
        for name, kind in (("shards", ShardInfo), ("quarantine", Quarantined)):
            plain[name] = tuple(kind(**item) for item in plain[name])
        plain["samples"] = tuple(CardSample(**sample) for sample in plain["samples"])
        return Receipt(**plain)


def put_sealed(store: Store, key: str, data: bytes) -> None:
    """Writes `data` behind its checksum."""
    store.put(key, xxhash.xxh3_128_digest(data) + data)


def get_sealed(store: Store, key: str) -> bytes | None:
    """What `put_sealed` wrote; None if it is missing or two reads find it damaged."""
    for _ in range(2):
        try:
            data = store.get(key)
        except MissingObjectError:
            return None
        if xxhash.xxh3_128_digest(data[16:]) == data[:16]:
            return data[16:]
    log.warning("%s/%s is damaged; it is ignored", store.uri, key)
    return None


def receipt_key(recipe: Recipe, index: int) -> str:
    """Key of a group's receipt."""
    return f"{recipe.work}/group/{index:06d}.json"


def survey_key(recipe: Recipe, index: int) -> str:
    """Key of a unit's survey."""
    return f"{recipe.work}/survey/{index:06d}.npz"


def shard_cuts(rows: int, recipe: Recipe) -> list[tuple[int, int]]:
    """First row and end of each shard of a group: about `shard_rows`, whole record batches."""
    parts = max(1, round(rows / recipe.shard_rows))
    size = max(recipe.batch_rows, -(-rows // parts // recipe.batch_rows) * recipe.batch_rows)
    return [(start, min(rows, start + size)) for start in range(0, rows, size)]
