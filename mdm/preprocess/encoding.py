"""The second pass of encoding: records -> decoded chunks -> latents.

Each job stage is a plain function; `mdm.preprocess.ray_executor` decides where it runs. The same
recipe and input give the same bytes, however the work is split, interrupted or retried. An image
that neighbouring records share is decoded and encoded once.

Shapes: n samples and p images of a chunk, H x W pixels, N image tokens, C latent width.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdm import sources
from mdm.data.manifest import Quarantined
from mdm.data.schema import Samples, sample_schema, to_bfloat16_bits, write_shard
from mdm.data.text import fit
from mdm.first_stage.image import decode_image
from mdm.first_stage.tokenizer import ASSISTANT, EOS, UNK, Tokenizer
from mdm.preprocess.duplicates import DROPPED
from mdm.preprocess.quality import text_problem
from mdm.preprocess.receipt import (
    SAMPLES,
    TEXT_TOKENS,
    UNKNOWN_TOKENS,
    CardSample,
    Receipt,
    lowest,
    put_sealed,
    receipt_key,
    sample_rank,
    shard_cuts,
)
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group
from mdm.sources.record import BadRecord, RawRecord, one_record
from mdm.storage import Store

if TYPE_CHECKING:  # job stages without a network start without torch
    from mdm.first_stage.autoencoder import Autoencoder

# A chunk holds at most so many samples for each image it may hold: dialogues have many turns.
_SAMPLES_AN_IMAGE = 8


@dataclass(frozen=True)
class Chunk:
    """Some samples that are being encoded, and what became of the records read with them."""

    samples: Samples
    pixels: NDArray[np.uint8] | None  # [p, 3, H, W] until they are encoded
    images: NDArray[np.int64]  # [n] which of the images belongs to each sample
    quarantine: tuple[Quarantined, ...]
    counts: Counter[str]
    card_samples: tuple[CardSample, ...]


class _Sample(NamedTuple):
    id: str
    tokens: NDArray[np.uint16]
    prompt: int  # leading tokens that are given as a condition
    origin: str = ""
    class_id: int = -1
    image: int = -1  # which one of the chunk


@dataclass
class _Gathering:
    """A chunk that is being filled."""

    samples: list[_Sample] = field(default_factory=list)
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    card_samples: list[CardSample] = field(default_factory=list)


class _Decoder:
    """The state of one group's decoding."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.now = _Gathering()
        self._last: tuple[bytes, NDArray[np.uint8] | str] | None = None  # an image, or its error
        self._ranks: list[int] = []  # of the card samples so far

    def full(self, record: RawRecord) -> bool:
        """Whether the chunk has to be taken before the record is added."""
        batch = self.recipe.encode_batch
        if record.image is None:
            return len(self.now.samples) >= batch
        shared = self._last is not None and self._last[0] == record.image
        return len(self.now.samples) >= _SAMPLES_AN_IMAGE * batch or (
            len(self.now.pixels) >= batch and not shared
        )

    def take(self) -> Chunk:
        """The chunk so far; a new one begins."""
        now, self.now, self._last = self.now, _Gathering(), None
        return Chunk(
            Samples(
                [s.id for s in now.samples],
                [s.origin for s in now.samples],
                np.array([s.class_id for s in now.samples], np.int32),
                [s.tokens for s in now.samples],
                np.array([s.prompt for s in now.samples], np.uint16),
                None,
            ),
            np.stack(now.pixels) if now.pixels else None,
            np.array([s.image for s in now.samples], np.int64),
            tuple(now.quarantine),
            now.counts,
            tuple(now.card_samples),
        )

    def add(self, record: RawRecord) -> str | None:
        """Adds the record's samples; returns the reason if it belongs in quarantine instead."""
        if record.image is None and self.recipe.image_size is not None:
            return "no image in a data set of images"
        if record.image is not None and self.recipe.image_size is None:
            return "an image in a data set of texts"
        counts = Counter[str]()
        try:
            with one_record(record.origin, passing=(UnicodeEncodeError,)):
                record.id.encode()
                label = np.int32(-1 if record.label is None else record.label)
                texts = list(self._texts(record, counts))
                pixels = self._pixels(record.image) if record.image is not None and texts else None
                card_samples = [
                    CardSample.of(text.id, self.tokenizer.decode(text.tokens.tolist()), pixels)
                    for text in texts
                    if self._may_be_shown(sample_rank(text.id))
                ]
        except UnicodeEncodeError:
            return "text is not valid Unicode"
        except ValueError as error:
            return str(error)
        now = self.now
        now.counts.update(counts)
        origin, image = below(record.origin, None), len(now.pixels) - 1
        now.samples += [
            text._replace(origin=origin, class_id=int(label), image=image) for text in texts
        ]
        for sample in card_samples:
            if self._may_be_shown(sample.rank):
                self._ranks = sorted([*self._ranks, sample.rank])[:SAMPLES]
                now.card_samples.append(sample)
        return None

    def _pixels(self, data: bytes) -> NDArray[np.uint8]:
        """The image, decoded unless the previous record had the same one."""
        assert self.recipe.image_size is not None
        if self._last is None or self._last[0] != data:
            try:
                with one_record():
                    pixels = decode_image(data, self.recipe.image_size)
            except ValueError as error:
                self._last = data, str(error)
            else:
                self._last = data, pixels
                self.now.pixels.append(pixels)
        if isinstance(self._last[1], str):
            raise ValueError(self._last[1])
        return self._last[1]

    def _may_be_shown(self, rank: int) -> bool:
        return len(self._ranks) < SAMPLES or rank < self._ranks[-1]

    def _texts(self, record: RawRecord, counts: Counter[str]) -> Iterator[_Sample]:
        """The caption, or one reply after another with the turns before it as the prompt."""
        if not record.turns:
            if record.text is None:
                raise ValueError("neither caption nor dialogue")
            if self._drop(record.text, self.recipe.min_chars, counts):
                return
            ids = [*self.tokenizer.encode_caption(record.text), EOS]
            if len(ids) == 1:
                raise ValueError("the text has no tokens")
            yield self._fitted(record.id, ids, 0, counts)
            return
        if len(record.turns) < 2:
            raise ValueError("a dialogue without a reply")
        # "2" is a good answer to a question about an image.
        least = self.recipe.min_chars if record.image is None else 1
        for k in range(len(record.turns) // 2):
            turns = record.turns[: 2 * k + 2]
            if self._drop(turns[-1], least, counts):
                continue
            ids, prompt = self.tokenizer.encode_dialogue(turns)
            shortened = len(ids) > self.recipe.text_length
            # Forget whole exchanges, the oldest first, before cutting into one.
            while len(ids) > self.recipe.text_length and len(turns) > 2:
                turns = turns[2:]
                ids, prompt = self.tokenizer.encode_dialogue(turns)
            if len(ids) <= self.recipe.text_length:
                counts["shortened texts"] += shortened
            yield self._fitted(f"{record.id}#t{k}", ids, prompt, counts)

    def _drop(self, text: str, least: int, counts: Counter[str]) -> bool:
        reason = text_problem(text, least)
        if reason and (self.recipe.text_filters or reason == "too short text"):
            counts[f"dropped: {reason}"] += 1
            return True
        return False

    def _fitted(self, name: str, ids: list[int], prompt: int, counts: Counter[str]) -> _Sample:
        counts["shortened texts"] += len(ids) > self.recipe.text_length
        return _Sample(name, *fit(np.array(ids, np.uint16), prompt, self.recipe.text_length))


def decode_group(group: Group, recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Chunk]:
    """The group's chunks: `encode_batch` images or texts each, except the last, maybe empty one."""
    decoder = _Decoder(recipe, tokenizer)
    for unit, left_out in zip(group.units, group.left_out, strict=True):
        for position, record in enumerate(sources.read(unit)):
            if isinstance(record, RawRecord) and decoder.full(record):
                yield decoder.take()
            counts = decoder.now.counts
            counts["records"] += 1
            reason = record.reason if isinstance(record, BadRecord) else left_out.get(position)
            if isinstance(record, RawRecord) and reason is None:
                reason = decoder.add(record)
            elif isinstance(record, RawRecord) and reason in DROPPED:
                counts[f"dropped: {reason}"] += 1
                reason = None
            if reason is not None:
                origin = below(record.origin, unit.root)
                decoder.now.quarantine.append(
                    Quarantined(_printable(record.id), _printable(reason), origin)
                )
    yield decoder.take()


def below(origin: str, root: str | None) -> str:
    """`origin` without the machine's part of its path, fit for UTF-8."""
    if root is not None and Path(origin).is_absolute():
        origin = origin.removeprefix(root).lstrip("/")
    return _printable(origin)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def encode_chunk(chunk: Chunk, recipe: Recipe, autoencoder: "Autoencoder") -> Chunk:
    """The chunk with latents in place of pixels.

    An image that the autoencoder fails on, or whose latents are not finite, is quarantined. The
    autoencoder always gets `encode_batch` images: with another batch size its kernels may take
    another path and round differently.
    """
    if chunk.pixels is None:
        return chunk
    import torch

    p = len(chunk.pixels)
    full = np.zeros((recipe.encode_batch, *chunk.pixels.shape[1:]), np.uint8)
    full[:p] = chunk.pixels

    def latents_of(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        with one_record(passing=(MemoryError,)):
            latents = autoencoder.encode(torch.from_numpy(batch)).float().cpu().numpy()
        return np.asarray(latents, np.float32).reshape(len(batch), -1)

    reasons: dict[int, str] = {}
    try:
        latents = latents_of(full)[:p]
    except ValueError:
        latents, reasons = _one_by_one(latents_of, full, p)
    good: NDArray[np.bool_] = np.asarray(np.isfinite(latents).all(axis=1))
    latents[~good] = 0
    kept = np.flatnonzero(good[chunk.images])
    bits = to_bfloat16_bits(latents)[chunk.images[kept]]
    bad = tuple(
        Quarantined(
            chunk.samples.ids[i],
            reasons.get(int(chunk.images[i]), "latents are not finite"),
            chunk.samples.origins[i],
        )
        for i in np.flatnonzero(~good[chunk.images]).tolist()
    )
    return dataclasses.replace(
        chunk,
        samples=dataclasses.replace(chunk.samples.take(kept), latents=bits),
        pixels=None,
        images=np.zeros(0, np.int64),
        quarantine=chunk.quarantine + bad,
    )


def _one_by_one(
    latents_of: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    full: NDArray[np.uint8],
    images: int,
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Latents of the images of a failed batch, NaN for those that fail alone, and why.

    If a blank batch fails too, the autoencoder is at fault and not an image: that error propagates.
    """
    blank = np.zeros_like(full)
    latents = np.full((images, latents_of(blank).shape[1]), np.nan, np.float32)
    reasons: dict[int, str] = {}
    for i in range(images):
        alone = blank.copy()
        alone[i] = full[i]
        try:
            latents[i] = latents_of(alone)[i]
        except ValueError as error:
            reasons[i] = str(error)
    return latents, reasons


def write_chunks(store: Store, group: Group, recipe: Recipe, chunks: Sequence[Chunk]) -> Receipt:
    """Writes the shards, then the receipt, of the group that consists of these chunks, in order.

    Samples are shuffled within the group and cut into shards of about `shard_rows` rows. An object
    that exists already has the same bytes: its name is their hash.
    """
    parts = [c.samples for c in chunks]
    samples = Samples.concatenate([p for p in parts if len(p)] or [parts[0]])
    shuffle = np.random.Generator(np.random.Philox(key=1, counter=group.index))
    rows = shuffle.permutation(len(samples))
    schema = sample_schema(recipe.image_grid, recipe.latent_dim)
    shards = []
    for start, stop in shard_cuts(len(rows), recipe):
        data, info = write_shard(samples.take(rows[start:stop]), schema, recipe.batch_rows)
        store.put(info.key, data, if_absent=True)
        shards.append(info)
    tokens = np.concatenate([*samples.tokens, np.zeros(0, np.uint16)])
    unknown = int((tokens == UNK).sum())
    counts = sum((c.counts for c in chunks), Counter[str]())
    counts[TEXT_TOKENS] += int((tokens > ASSISTANT).sum()) + unknown
    counts[UNKNOWN_TOKENS] += unknown
    receipt = Receipt(
        tuple(shards),
        tuple(q for c in chunks for q in c.quarantine),
        {k: v for k, v in sorted(counts.items()) if v},
        {str(k): v for k, v in sorted(Counter(map(len, samples.tokens)).items())},
        {str(k): v for k, v in sorted(Counter(samples.class_ids.tolist()).items())},
        lowest(s for c in chunks for s in c.card_samples),
    )
    put_sealed(store, receipt_key(recipe, group.index), receipt.to_bytes())
    return receipt
