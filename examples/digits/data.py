"""The smallest real task: scikit-learn's 8 x 8 digits with captions from several templates.

Writes the tokenizer and the encoded data set that the trainer reads. A fifth of the 1,797
handwritten digits (UCI, Alpaydin and Kaynak, CC BY 4.0) is held out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from mdm.data.manifest import Manifest, publish
from mdm.data.manifest_parts import quarantine_parts, shard_parts
from mdm.data.schema import Samples, sample_schema, to_bfloat16_bits, write_shard
from mdm.evaluate.caption import ClassNames
from mdm.first_stage.folder import PIXELS
from mdm.first_stage.pixel_patches import PixelPatches, fitted
from mdm.first_stage.tokenizer import EOS, Tokenizer, train_model
from mdm.storage import open_store

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{word}",
    "the digit {word}",
    "a handwritten {word}",
    "a small {word}",
    "number {numeral}",
    "this is a {numeral}",
)
NAMES = ClassNames(tuple((word, str(numeral)) for numeral, word in enumerate(WORDS)))
VOCAB_SIZE = 96
PATCH = 4
HELD_OUT = 5  # every fifth image of a class
BATCH_ROWS = 128


def caption(digit: int, template: int) -> str:
    """The caption of a digit in one of the templates."""
    return TEMPLATES[template % len(TEMPLATES)].format(word=WORDS[digit], numeral=digit)


@dataclass(frozen=True)
class Digits:
    """Images [n, 8, 8] in [0, 1] and their classes i64 [n]."""

    grey: Tensor
    labels: Tensor


def split() -> tuple[Digits, Digits]:
    """Training and held-out images; a fifth of every class is held out."""
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images / 16.0).float()
    labels = torch.from_numpy(bunch.target).long()
    rank = torch.zeros_like(labels)
    for c in range(len(WORDS)):
        of_class = labels == c
        rank[of_class] = torch.arange(int(of_class.sum()))
    held = rank % HELD_OUT == 0
    return Digits(grey[~held], labels[~held]), Digits(grey[held], labels[held])


def write(folder: Path) -> tuple[Digits, Digits, PixelPatches]:
    """Write `tokenizer.model` and `encoded/digits` into `folder`: each image with each caption.

    Returns training images, held-out images, and the mapping between images and latents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = split()
    pixels = fitted(train.grey, PATCH)
    path = folder / "tokenizer.model"
    path.write_bytes(train_model(_corpus(), VOCAB_SIZE, layout=False))
    tokenizer = Tokenizer(path)
    store = open_store(str(folder / "encoded" / "digits"))
    data, shard = write_shard(
        _examples(train, pixels, tokenizer),
        sample_schema(pixels.grid, pixels.latent_dim),
        BATCH_ROWS,
    )
    store.put(shard.key, data)
    publish(
        store,
        Manifest(
            dataset="digits",
            split="train",
            recipe_hash=f"digits in {PATCH} x {PATCH} patches, {len(TEMPLATES)} captions each",
            tokenizer_sha256=tokenizer.sha256,
            autoencoder_sha256=PIXELS,
            image_grid=pixels.grid,
            latent_dim=pixels.latent_dim,
            vocab_size=tokenizer.vocab_size,
            class_names=WORDS,
            batch_rows=BATCH_ROWS,
            shards=shard_parts([shard], BATCH_ROWS),
            quarantine=quarantine_parts(),
            counts={"examples": shard.rows},
            card_sha256="",
        ),
    )
    return train, heldout, pixels


def _corpus() -> list[str]:
    """Captions and the set's description: too few words would give pieces of single letters."""
    lines = [caption(c, t) for c in range(len(WORDS)) for t in range(len(TEMPLATES))]
    return lines * 100 + [line.strip() for line in load_digits().DESCR.splitlines() if line.strip()]


def _examples(digits: Digits, pixels: PixelPatches, tokenizer: Tokenizer) -> Samples:
    n, k = len(digits.labels), len(TEMPLATES)
    # The captions of an image are far apart, so that a shuffle window holds many images.
    rows = [(i, (i + turn) % k) for turn in range(k) for i in range(n)]
    picks = np.array([i for i, _ in rows])
    latents = to_bfloat16_bits(pixels.encode(digits.grey).flatten(1).numpy())
    return Samples(
        ids=[f"digit-{i:04d}-{t}" for i, t in rows],
        origins=[f"sklearn/digits::{i}" for i, _ in rows],
        class_ids=digits.labels.numpy().astype(np.int32)[picks],
        tokens=[
            np.array([*tokenizer.encode(caption(int(digits.labels[i]), t)), EOS], np.uint16)
            for i, t in rows
        ],
        prompt_lengths=np.zeros(len(rows), np.uint16),
        latents=latents[picks],
    )


def captions(labels: Sequence[int]) -> list[str]:
    """A caption for each label, from each template in turn."""
    return [caption(c, i // len(WORDS)) for i, c in enumerate(labels)]
