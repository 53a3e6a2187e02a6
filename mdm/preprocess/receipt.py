"""What a finished piece of work leaves behind: shards, then a receipt that says what is in them.

Objects under `work/` carry a checksum of their own: the storage's is not checked on every path.
"""

import base64
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from mdm.data.manifest import Quarantined, canonical
from mdm.data.schema import BatchInfo, Samples, ShardInfo, sample_schema, write_shard
from mdm.first_stage.tokenizer import ASSISTANT, UNK
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group
from mdm.storage import MissingObjectError, Store
from mdm.utils.files import warn_once

# Among the counts: the pieces of all texts, without marks, and those of them that are unknown.
TEXT_TOKENS, UNKNOWN_TOKENS = "text tokens", "unknown tokens"
SAMPLES = 12  # examples that a dataset card shows
_SMALL = 64  # pixels: larger images are shown as JPEG


@dataclass(frozen=True)
class CardSample:
    """An example for people: the `rank` is a hash of its id, and the lowest ranks are shown."""

    rank: int
    id: str
    text: str
    image: str  # base64 of a PNG or JPEG file; "" for texts alone

    @staticmethod
    def of(record_id: str, text: str, pixels: NDArray[np.uint8] | None) -> "CardSample":
        """An example's sample; pixels are [3, H, W]."""
        return CardSample(sample_rank(record_id), record_id, text, _image(pixels))


def sample_rank(record_id: str) -> int:
    """Of two examples, the one of lower rank is shown rather: any few, always the same."""
    return xxhash.xxh3_64_intdigest(record_id.encode("utf-8", "backslashreplace")) >> 11


def _image(pixels: NDArray[np.uint8] | None) -> str:
    if pixels is None:
        return ""
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if max(image.size) <= _SMALL:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def lowest(samples: Iterable[CardSample]) -> tuple[CardSample, ...]:
    """The SAMPLES samples of lowest rank."""
    return tuple(sorted(samples, key=lambda s: (s.rank, s.id))[:SAMPLES])


@dataclass(frozen=True)
class Receipt:
    """A group that is done: its shards are written."""

    shards: tuple[ShardInfo, ...]
    quarantine: tuple[Quarantined, ...]
    counts: dict[str, int]
    token_lengths: dict[str, int]  # length -> texts
    classes: dict[str, int]  # class id -> examples
    samples: tuple[CardSample, ...] = ()

    def to_bytes(self) -> bytes:
        """As its object holds it, before it is sealed."""
        return canonical(dataclasses.asdict(self))

    @staticmethod
    def from_bytes(data: bytes) -> "Receipt":
        """The receipt that `to_bytes` wrote."""
        plain: dict[str, Any] = json.loads(data)
        return Receipt(
            shards=tuple(
                ShardInfo(**s | {"batches": tuple(BatchInfo(**b) for b in s["batches"])})
                for s in plain.pop("shards")
            ),
            quarantine=tuple(Quarantined(**q) for q in plain.pop("quarantine")),
            samples=tuple(CardSample(**s) for s in plain.pop("samples")),
            **plain,
        )


def put_sealed(store: Store, key: str, data: bytes) -> None:
    """Write `data` behind its checksum."""
    store.put(key, xxhash.xxh3_128_digest(data) + data)


def get_sealed(store: Store, key: str) -> bytes | None:
    """What `put_sealed` wrote; None if it is not there or, read twice, not what was written."""
    for _ in range(2):
        try:
            data = store.get(key)
        except MissingObjectError:
            return None
        if xxhash.xxh3_128_digest(data[16:]) == data[:16]:
            return data[16:]
    warn_once(f"{store.uri}/{key} is damaged; it is ignored")
    return None


def receipt_key(recipe: Recipe, index: int) -> str:
    """Where the receipt of the group of this index lies."""
    return f"{recipe.work}/group/{index:06d}.json"


def survey_key(recipe: Recipe, index: int) -> str:
    """Where the survey of the unit of this index lies."""
    return f"{recipe.work}/survey/{index:06d}.npz"


def write_group(
    store: Store,
    group: Group,
    recipe: Recipe,
    parts: Sequence[Samples],
    quarantine: Sequence[Quarantined],
    counts: Counter[str],
    samples: Iterable[CardSample],
) -> Receipt:
    """Write the group's shards, then its receipt.

    Rows are shuffled within the group, and the shards are of about `shard_rows` rows. An object
    that is there already has the same bytes: its name is their hash.
    """
    examples = Samples.concatenate([p for p in parts if len(p)] or [parts[0]])
    rows = np.random.Generator(np.random.Philox(key=1, counter=group.index)).permutation(
        len(examples)
    )
    schema = sample_schema(recipe.image_grid, recipe.latent_dim)
    shards = []
    for start, stop in shard_cuts(len(rows), recipe):
        data, info = write_shard(examples.take(rows[start:stop]), schema, recipe.batch_rows)
        store.put(info.key, data, if_absent=True)
        shards.append(info)
    tokens = np.concatenate(examples.tokens) if len(examples) else np.zeros(0, np.uint16)
    counts = counts + Counter(
        {TEXT_TOKENS: int((tokens > ASSISTANT).sum() + (tokens == UNK).sum())}
        | {UNKNOWN_TOKENS: int((tokens == UNK).sum())}
    )
    receipt = Receipt(
        tuple(shards),
        tuple(quarantine),
        {k: v for k, v in sorted(counts.items()) if v},
        _histogram(len(t) for t in examples.tokens),
        _histogram(examples.class_ids.tolist()),
        lowest(samples),
    )
    put_sealed(store, receipt_key(recipe, group.index), receipt.to_bytes())
    return receipt


def shard_cuts(rows: int, recipe: Recipe) -> list[tuple[int, int]]:
    """First row and end of each shard of a group: about `shard_rows`, whole record batches."""
    parts = max(1, round(rows / recipe.shard_rows))
    size = max(recipe.batch_rows, -(-rows // parts // recipe.batch_rows) * recipe.batch_rows)
    return [(start, min(rows, start + size)) for start in range(0, rows, size)]


def _histogram(values: Any) -> dict[str, int]:
    return {str(k): v for k, v in sorted(Counter(values).items())}
