"""Counter-based randomness: every draw is a function of (seed, sample, epoch), never of a rank."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

N_UNIFORMS = 8
# Separate streams: image noise does not depend on the text's length.
IMAGE, TEXT, STEP = 1, 2, 3


class Draws(NamedTuple):
    """The random numbers of a batch: uniforms [b, 8]; normals [b, 2, n, c] and [b, 2, m, c]."""

    uniforms: Tensor
    image: Tensor | None
    text: Tensor

    def to(self, device: torch.device) -> "Draws":
        """The same numbers on `device`, without waiting for it."""
        image = None if self.image is None else self.image.to(device, non_blocking=True)
        uniforms, text = (t.to(device, non_blocking=True) for t in (self.uniforms, self.text))
        return Draws(uniforms, image, text)


def draw(
    seed: int,
    keys: Tensor,
    epochs: Tensor,
    n_image: int,
    n_text: int,
    latent_dim: int,
    text_of: Tensor | None = None,
) -> Draws:
    """Uniforms and normals of each sample, on the CPU.

    Args:
        seed: the run's seed.
        keys: i64 [b], the `mdm.data.batch.sample_keys` of the samples.
        epochs: i64 [b].
        n_image: image tokens, 0 without images.
        n_text: text tokens.
        latent_dim: values per token.
        text_of: i64 [r, m] of packed texts, as in `Batch`; the text's normals are then
            [r, 2, m, c], and each text gets the same ones as when it is not packed.
    """
    uniforms = np.empty((len(keys), N_UNIFORMS), np.float32)
    image = np.empty((len(keys), 2, n_image, latent_dim), np.float32)
    rows = len(keys) if text_of is None else len(text_of)
    text = np.zeros((rows, 2, n_text, latent_dim), np.float32)
    spans = [(i, 0, n_text) for i in range(rows)] if text_of is None else _spans(text_of)
    for i, (key, epoch) in enumerate(zip(keys.tolist(), epochs.tolist(), strict=True)):
        philox = [seed & 0xFFFFFFFF | epoch << 32, key]
        uniforms[i] = _generator(philox, 0).random(N_UNIFORMS, np.float32)
        if n_image:
            _generator(philox, IMAGE).standard_normal(out=image[i], dtype=np.float32)
        row, start, end = spans[i]
        text[row, :, start:end] = _generator(philox, TEXT).standard_normal(
            (2, end - start, latent_dim), np.float32
        )
    return Draws(
        torch.from_numpy(uniforms),
        torch.from_numpy(image) if n_image else None,
        torch.from_numpy(text),
    )


def uniform(seed: int, step: int) -> float:
    """A uniform in [0, 1) that a whole global step shares."""
    return float(_generator([seed & 0xFFFFFFFF, step], STEP).random())


def _generator(key: list[int], stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def _spans(text_of: Tensor) -> list[tuple[int, int, int]]:
    """(row, first token, end) of each packed text, in the order of the texts."""
    flat, width = text_of.flatten().numpy(), text_of.shape[1]
    texts, first, lengths = np.unique(flat, return_index=True, return_counts=True)
    spans = []
    for text, at, length in zip(texts.tolist(), first.tolist(), lengths.tolist(), strict=True):
        if text >= 0:
            row, start = divmod(at, width)
            spans.append((row, start, start + length))
    return spans
