"""The second pass of encoding: records -> decoded chunks -> latents.

Each stage is a plain function; `mdm.preprocess.ray_executor` decides where it runs. The same recipe
and input give the same bytes, however the work is split, interrupted or retried. An image that
neighbouring records share is decoded and encoded once.

Shapes: n examples and p images of a chunk, H x W pixels, N image tokens, C numbers a latent.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mdm import sources
from mdm.data.manifest import Quarantined
from mdm.data.schema import Samples, to_bfloat16_bits
from mdm.data.text import fit
from mdm.first_stage.image import decode_image
from mdm.first_stage.tokenizer import EOS, Tokenizer
from mdm.preprocess.duplicates import DROPPED
from mdm.preprocess.quality import text_problem
from mdm.preprocess.receipt import SAMPLES, Receipt, CardSample, lowest, sample_rank, write_group
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group
from mdm.sources.record import BadRecord, RawRecord, Unit, one_record
from mdm.storage import Store

# A chunk's examples, at most this many for each image it may hold: dialogues have many turns.
_EXAMPLES_AN_IMAGE = 8


def has_images(units: Sequence[Unit]) -> bool:
    """Whether the data set's first readable record has an image; ValueError if none is."""
    for unit in units:
        for record in sources.read(unit):
            if isinstance(record, RawRecord):
                return record.image is not None
    raise ValueError("not one record of the data set can be read; is --root the right folder?")


class ImageEncoder(Protocol):
    """What encoding needs of `mdm.first_stage.autoencoder.Autoencoder`."""

    def encode(self, pixels: Any) -> Any:
        """Latents f32 [n, N, C] of pixels u8 [n, 3, H, W]."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Some examples on their way, and what became of the records read beside them."""

    examples: Samples
    pixels: NDArray[np.uint8] | None  # [p, 3, H, W] until they are encoded
    images: NDArray[np.int64]  # [n] which of the images is whose
    quarantine: tuple[Quarantined, ...]
    counts: Counter[str]
    samples: tuple[CardSample, ...]


@dataclass
class _Gathering:
    ids: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)
    tokens: list[NDArray[np.uint16]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[CardSample] = field(default_factory=list)

    def chunk(self) -> Chunk:
        """All of it."""
        return Chunk(
            Samples(
                self.ids,
                self.origins,
                np.array(self.class_ids, np.int32),
                self.tokens,
                np.array(self.prompts, np.uint16),
                None,
            ),
            np.stack(self.pixels) if self.pixels else None,
            np.array(self.images, np.int64),
            tuple(self.quarantine),
            self.counts,
            tuple(self.samples),
        )


class _Decoder:
    """The state of one group's decoding."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.now = _Gathering()
        self._last: tuple[bytes, NDArray[np.uint8] | str] | None = None
        self._ranks: list[int] = []  # of the samples so far

    def full(self, record: RawRecord) -> bool:
        """Whether the chunk has to be taken before the record is added."""
        batch = self.recipe.encode_batch
        if record.image is None:
            return len(self.now.ids) >= batch
        shared = self._last is not None and self._last[0] == record.image
        return len(self.now.ids) >= _EXAMPLES_AN_IMAGE * batch or (
            len(self.now.pixels) >= batch and not shared
        )

    def take(self) -> Chunk:
        """The chunk, and begin another."""
        chunk, self.now, self._last = self.now.chunk(), _Gathering(), None
        return chunk

    def add(self, record: RawRecord) -> str | None:
        """Add the record's examples; the reason if it belongs in quarantine instead."""
        if (record.image is None) != (self.recipe.image_size is None):
            return (
                "no image in a data set of images"
                if record.image is None
                else ("an image in a data set of texts")
            )
        counts = Counter[str]()
        try:
            with one_record(record.origin, passing=(UnicodeEncodeError,)):
                record.id.encode()
                label = np.int32(-1 if record.label is None else record.label)
                texts = list(self._texts(record, counts))
                pixels = self._pixels(record.image) if record.image is not None and texts else None
                samples = [
                    self._sample(record.id + suffix, ids, pixels) for suffix, ids, _ in texts
                ]
        except UnicodeEncodeError:
            return "text is not valid Unicode"
        except ValueError as error:
            return str(error)
        now = self.now
        now.counts.update(counts)
        for suffix, tokens, prompt in texts:
            now.ids.append(record.id + suffix)
            now.origins.append(below(record.origin, None))
            now.class_ids.append(int(label))
            now.tokens.append(tokens)
            now.prompts.append(prompt)
            now.images.append(len(now.pixels) - 1)
        self._keep(sample for sample in samples if sample is not None)
        return None

    def _pixels(self, data: bytes) -> NDArray[np.uint8]:
        """The image, decoded unless the record before had the same."""
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
        found = self._last[1]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _sample(
        self, example: str, tokens: NDArray[np.uint16], pixels: NDArray[np.uint8] | None
    ) -> CardSample | None:
        """The example's, if it may be one of the lowest."""
        if len(self._ranks) == SAMPLES and sample_rank(example) >= self._ranks[-1]:
            return None
        return CardSample.of(example, self.tokenizer.decode(tokens.tolist()), pixels)

    def _keep(self, samples: Iterable[CardSample]) -> None:
        for sample in samples:
            if len(self._ranks) < SAMPLES or sample.rank < self._ranks[-1]:
                self._ranks = sorted([*self._ranks, sample.rank])[:SAMPLES]
                self.now.samples.append(sample)

    def _texts(
        self, record: RawRecord, counts: Counter[str]
    ) -> Iterator[tuple[str, NDArray[np.uint16], int]]:
        """(id suffix, tokens, prompt length): the caption, or one reply after another."""
        if not record.turns:
            if record.text is None:
                raise ValueError("neither caption nor dialogue")
            if self._drop(record.text, self.recipe.min_chars, counts):
                return
            ids = [*self.tokenizer.encode_caption(record.text), EOS]
            if len(ids) == 1:
                raise ValueError("the text has no tokens")
            yield "", *self._fitted(ids, 0, counts)
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
            yield f"#t{k}", *self._fitted(ids, prompt, counts)

    def _drop(self, text: str, least: int, counts: Counter[str]) -> bool:
        reason = text_problem(text, least)
        if reason and (self.recipe.text_filters or reason == "too short text"):
            counts[f"dropped: {reason}"] += 1
            return True
        return False

    def _fitted(
        self, ids: list[int], prompt: int, counts: Counter[str]
    ) -> tuple[NDArray[np.uint16], int]:
        counts["shortened texts"] += len(ids) > self.recipe.text_length
        return fit(np.array(ids, np.uint16), prompt, self.recipe.text_length)


def decode_group(group: Group, recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Chunk]:
    """The group's chunks: `encode_batch` images, or texts, but the last, which may be empty."""
    decoder = _Decoder(recipe, tokenizer)
    for unit, left_out in zip(group.units, group.left_out, strict=True):
        for position, record in enumerate(sources.read(unit)):
            if isinstance(record, RawRecord) and decoder.full(record):
                yield decoder.take()
            decoder.now.counts["records"] += 1
            reason = record.reason if isinstance(record, BadRecord) else left_out.get(position)
            if isinstance(record, RawRecord) and reason is None:
                reason = decoder.add(record)
            elif isinstance(record, RawRecord) and reason in DROPPED:
                decoder.now.counts[f"dropped: {reason}"] += 1
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


def encode_chunk(chunk: Chunk, recipe: Recipe, autoencoder: ImageEncoder) -> Chunk:
    """The chunk with latents for pixels.

    An image that the autoencoder fails on, or whose latents are not finite, is quarantined. The
    autoencoder always sees `encode_batch` images: another batch size may take another path
    through its kernels and round differently.
    """
    if chunk.pixels is None:
        return chunk
    import torch  # the stages that need no network start without it

    p = len(chunk.pixels)
    full = np.zeros((recipe.encode_batch, *chunk.pixels.shape[1:]), np.uint8)
    full[:p] = chunk.pixels

    def latents_of(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        with one_record(passing=(MemoryError,)):
            found = autoencoder.encode(torch.from_numpy(batch)).float().cpu().numpy()
        return np.asarray(found, np.float32).reshape(len(batch), -1)

    reasons: dict[int, str] = {}
    try:
        latents = latents_of(full)[:p]
    except ValueError:
        latents, reasons = _one_by_one(latents_of, full, p)
    good: NDArray[np.bool_] = np.asarray(np.isfinite(latents).all(axis=1))
    kept = np.flatnonzero(good[chunk.images])
    bad = tuple(
        Quarantined(
            chunk.examples.ids[i],
            reasons.get(int(chunk.images[i]), "latents are not finite"),
            chunk.examples.origins[i],
        )
        for i in np.flatnonzero(~good[chunk.images]).tolist()
    )
    latents[~good] = 0
    bits = to_bfloat16_bits(latents)[chunk.images[kept]]
    return dataclasses.replace(
        chunk,
        examples=dataclasses.replace(chunk.examples.take(kept), latents=bits),
        pixels=None,
        images=np.zeros(0, np.int64),
        quarantine=chunk.quarantine + bad,
    )


def _one_by_one(
    latents_of: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    full: NDArray[np.uint8],
    images: int,
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Latents of the images of a batch that failed, NaN for those that fail alone, and why.

    Where a batch of none fails, too, the autoencoder is at fault and no image: that goes on.
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
    """Write the group whose chunks these are, all of them and in order."""
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk.counts)
    return write_group(
        store,
        group,
        recipe,
        [c.examples for c in chunks],
        [q for c in chunks for q in c.quarantine],
        counts,
        lowest(s for c in chunks for s in c.samples),
    )
