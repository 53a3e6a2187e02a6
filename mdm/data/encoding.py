"""The second pass of encoding: records -> decoded chunks -> latents -> shards.

Each stage is a plain function; the executor in `pipelines/encode.py` says where it runs. The same
recipe and input give the same bytes, however the work is split, interrupted or retried.

Shapes: n examples of a chunk, H x W pixels, N image tokens, C numbers a latent.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mdm import sources
from mdm.data.image import decode_image
from mdm.data.manifest import Quarantined, canonical, shard_from_json
from mdm.data.schema import (
    MAX_VOCAB_SIZE,
    Examples,
    ShardInfo,
    example_schema,
    to_bfloat16_bits,
    write_shard,
)
from mdm.data.storage import Store
from mdm.data.survey import ID_TAKEN, Group
from mdm.data.text import fit
from mdm.data.tokenizer import EOS, Tokenizer
from mdm.sources.record import BadRecord, RawRecord, Unit

# Raise it whenever the same input would give other bytes.
CODE_VERSION = 1
TOO_SHORT = "too short text"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the bytes of an encoded data set."""

    dataset: str
    split: str
    inputs_sha256: str  # of the units' fingerprints
    tokenizer_sha256: str
    vocab_size: int
    autoencoder_sha256: str | None
    image_size: int | None  # pixels, each way; None for text alone
    image_grid: tuple[int, int] | None
    latent_dim: int
    text_length: int
    min_chars: int
    shard_rows: int
    batch_rows: int
    encode_batch: int
    encoder_threads: int
    device: str
    code_version: int = CODE_VERSION

    def __post_init__(self) -> None:
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} pieces, shards hold up to {MAX_VOCAB_SIZE}"
            )
        if self.text_length < 4:
            raise ValueError(f"text_length is {self.text_length}; at least 4 tokens are needed")
        for name in ("min_chars", "shard_rows", "batch_rows", "encode_batch", "encoder_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def hash(self) -> str:
        """sha256 of all of it."""
        return hashlib.sha256(canonical(dataclasses.asdict(self))).hexdigest()

    @property
    def work(self) -> str:
        """Where this recipe's receipts lie until the manifest is published."""
        return f"work/{self.hash[:16]}"


def inputs_sha256(units: Sequence[Unit]) -> str:
    """sha256 over the units' fingerprints, in order."""
    return hashlib.sha256("\n".join(u.fingerprint for u in units).encode()).hexdigest()


def has_pictures(units: Sequence[Unit]) -> bool:
    """Whether the data set's first readable record has a picture; ValueError if none is."""
    for unit in units:
        for record in sources.get(unit.source).read(unit):
            if isinstance(record, RawRecord):
                return record.image is not None
    raise ValueError("not one record of the data set can be read; is --root the right folder?")


class PictureEncoder(Protocol):
    """What encoding needs of `mdm.data.autoencoder.Autoencoder`."""

    def encode(self, pixels: Any) -> Any:
        """Latents f32 [n, N, C] of pixels u8 [n, 3, H, W]."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Some examples on their way, and what became of the records read beside them."""

    examples: Examples
    pixels: NDArray[np.uint8] | None  # [n, 3, H, W] until they are encoded
    quarantine: tuple[Quarantined, ...]
    counts: Counter[str]


@dataclass
class _Gathering:
    ids: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)
    tokens: list[NDArray[np.uint16]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def take(self, n: int) -> Chunk:
        """The first `n` examples and all the news as a chunk."""
        chunk = Chunk(
            Examples(
                self.ids[:n],
                self.origins[:n],
                np.array(self.class_ids[:n], np.int32),
                self.tokens[:n],
                np.array(self.prompts[:n], np.uint16),
                None,
            ),
            np.stack(self.pixels[:n]) if self.pixels else None,
            tuple(self.quarantine),
            self.counts,
        )
        for part in (self.ids, self.origins, self.class_ids, self.tokens, self.prompts):
            del part[:n]
        del self.pixels[:n]
        self.quarantine, self.counts = [], Counter()
        return chunk


def decode_group(group: Group, recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Chunk]:
    """The group's chunks, each of `encode_batch` examples but the last, which may be empty."""
    now = _Gathering()
    for unit, left_out in zip(group.units, group.left_out, strict=True):
        for position, record in enumerate(sources.get(unit.source).read(unit)):
            now.counts["records"] += 1
            reason = record.reason if isinstance(record, BadRecord) else left_out.get(position)
            if isinstance(record, RawRecord) and reason is None:
                reason = _add(now, record, recipe, tokenizer)
            elif isinstance(record, RawRecord) and reason != ID_TAKEN:
                now.counts[f"dropped: {reason}"] += 1
                reason = None
            if reason is not None:
                origin = _below(record.origin, unit.root)
                now.quarantine.append(Quarantined(_printable(record.id), reason, origin))
            while len(now.ids) >= recipe.encode_batch:
                yield now.take(recipe.encode_batch)
    yield now.take(len(now.ids))


def _add(now: _Gathering, record: RawRecord, recipe: Recipe, tokenizer: Tokenizer) -> str | None:
    """Add the record's examples; the reason if it belongs in quarantine instead."""
    pixels = None
    if (record.image is None) != (recipe.image_size is None):
        return (
            "no picture in a data set of pictures"
            if record.image is None
            else ("a picture in a data set of texts")
        )
    try:
        record.id.encode()
        texts = list(_texts(record, recipe, tokenizer, now.counts))
        if record.image is not None and recipe.image_size is not None and texts:
            pixels = decode_image(record.image, recipe.image_size)
    except UnicodeEncodeError:
        return "text is not valid Unicode"
    except ValueError as error:
        return str(error)
    for suffix, tokens, prompt in texts:
        now.ids.append(record.id + suffix)
        now.origins.append(_below(record.origin, None))
        now.class_ids.append(-1 if record.label is None else record.label)
        now.tokens.append(tokens)
        now.prompts.append(prompt)
        if pixels is not None:
            now.pixels.append(pixels)
    return None


def _texts(
    record: RawRecord, recipe: Recipe, tokenizer: Tokenizer, counts: Counter[str]
) -> Iterator[tuple[str, NDArray[np.uint16], int]]:
    """(id suffix, tokens, prompt length): the caption, or one reply of a dialogue after another."""
    if not record.turns:
        if record.text is None:
            raise ValueError("neither caption nor dialogue")
        if len(" ".join(record.text.split())) < recipe.min_chars:
            counts[f"dropped: {TOO_SHORT}"] += 1
            return
        ids = [*tokenizer.encode(record.text), EOS]
        if len(ids) == 1:
            raise ValueError("the text has no tokens")
        yield "", *_fitted(ids, 0, recipe, counts)
        return
    if len(record.turns) < 2:
        raise ValueError("a dialogue without a reply")
    for k in range(len(record.turns) // 2):
        turns = record.turns[: 2 * k + 2]
        if len(turns[-1].strip()) < recipe.min_chars:
            counts[f"dropped: {TOO_SHORT}"] += 1
            continue
        ids, prompt = tokenizer.encode_dialogue(turns)
        shortened = len(ids) > recipe.text_length
        # Forget whole exchanges, the oldest first, before cutting into one.
        while len(ids) > recipe.text_length and len(turns) > 2:
            turns = turns[2:]
            ids, prompt = tokenizer.encode_dialogue(turns)
        if len(ids) <= recipe.text_length:
            counts["shortened texts"] += shortened
        yield f"#t{k}", *_fitted(ids, prompt, recipe, counts)


def _fitted(
    ids: list[int], prompt: int, recipe: Recipe, counts: Counter[str]
) -> tuple[NDArray[np.uint16], int]:
    counts["shortened texts"] += len(ids) > recipe.text_length
    return fit(np.array(ids, np.uint16), prompt, recipe.text_length)


def _below(origin: str, root: str | None) -> str:
    """`origin` without the machine's part of its path, fit for UTF-8."""
    if root is not None and Path(origin).is_absolute():
        origin = origin.removeprefix(root).lstrip("/")
    return _printable(origin)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def encode_chunk(chunk: Chunk, recipe: Recipe, autoencoder: PictureEncoder) -> Chunk:
    """The chunk with latents for pixels; a picture whose latents are not finite is quarantined.

    The autoencoder always sees `encode_batch` pictures: another batch size may take another path
    through its kernels and round differently.
    """
    if chunk.pixels is None:
        return chunk
    import torch  # the stages that need no network start without it

    n = len(chunk.pixels)
    full = np.zeros((recipe.encode_batch, *chunk.pixels.shape[1:]), np.uint8)
    full[:n] = chunk.pixels
    latents = autoencoder.encode(torch.from_numpy(full))[:n].float().cpu().numpy().reshape(n, -1)
    good = np.isfinite(latents).all(axis=1)
    bad = tuple(
        Quarantined(chunk.examples.ids[i], "latents are not finite", chunk.examples.origins[i])
        for i in np.flatnonzero(~good).tolist()
    )
    kept = chunk.examples.take(np.flatnonzero(good))
    examples = dataclasses.replace(kept, latents=to_bfloat16_bits(latents[good]))
    return Chunk(examples, None, chunk.quarantine + bad, chunk.counts)


@dataclass(frozen=True)
class Receipt:
    """A group that is done: its shards are written."""

    shards: tuple[ShardInfo, ...]
    quarantine: tuple[Quarantined, ...]
    counts: dict[str, int]
    token_lengths: dict[str, int]  # length -> texts
    classes: dict[str, int]  # class id -> examples

    def to_bytes(self) -> bytes:
        """As its object holds it."""
        return canonical(dataclasses.asdict(self))

    @staticmethod
    def from_json(plain: dict[str, Any]) -> "Receipt":
        """The receipt that `to_bytes` wrote."""
        shards = tuple(shard_from_json(s) for s in plain["shards"])
        quarantine = tuple(Quarantined(**q) for q in plain["quarantine"])
        return Receipt(**(plain | {"shards": shards, "quarantine": quarantine}))


def write_group(store: Store, group: Group, recipe: Recipe, chunks: Sequence[Chunk]) -> Receipt:
    """Write the group's shards, then its receipt.

    Rows are shuffled within the group, and the shards are of about `shard_rows` rows. An object
    that is there already has the same bytes: its name is their hash.
    """
    examples = Examples.concatenate(
        [c.examples for c in chunks if len(c.examples)] or [chunks[0].examples]
    )
    rows = np.random.Generator(np.random.Philox(key=1, counter=group.index)).permutation(
        len(examples)
    )
    schema = example_schema(recipe.image_grid, recipe.latent_dim)
    parts = max(1, round(len(rows) / recipe.shard_rows))
    size = -(-len(rows) // parts // recipe.batch_rows) * recipe.batch_rows
    shards = []
    for start in range(0, len(rows), max(size, recipe.batch_rows)):
        part = examples.take(rows[start : start + max(size, recipe.batch_rows)])
        data, info = write_shard(part, schema, recipe.batch_rows)
        store.put(info.key, data, if_absent=True)
        shards.append(info)
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk.counts)
    quarantine = tuple(q for c in chunks for q in c.quarantine)
    receipt = Receipt(
        tuple(shards),
        quarantine,
        {k: v for k, v in sorted(counts.items()) if v},
        _histogram(len(t) for t in examples.tokens),
        _histogram(examples.class_ids.tolist()),
    )
    store.put(f"{recipe.work}/group/{group.index:06d}.json", receipt.to_bytes())
    return receipt


def _histogram(values: Any) -> dict[str, int]:
    return {str(k): v for k, v in sorted(Counter(values).items())}
