"""Counter-based randomness: every draw is a function of (seed, sample, epoch), never of a rank."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

N_UNIFORMS = 8
IMAGE, TEXT = 1, 2  # streams: a sample's image noise does not depend on its text's length


class Draws(NamedTuple):
    """What a batch needs: uniforms [b, 8]; normals [b, 2, n, c] and [b, 2, m, c]."""

    uniforms: Tensor
    image: Tensor | None
    text: Tensor


def draw(
    seed: int, keys: Tensor, epochs: Tensor, n_image: int, n_text: int, latent_dim: int
) -> Draws:
    """Uniforms and normals of each sample.

    Args:
        seed: of the run.
        keys: i64 [b], `mdm.data.batch.sample_key` of each sample.
        epochs: i64 [b].
        n_image: image tokens, 0 without pictures.
        n_text: text tokens.
        latent_dim: numbers a token.
    """
    uniforms = np.empty((len(keys), N_UNIFORMS), np.float32)
    image = np.empty((len(keys), 2, n_image, latent_dim), np.float32)
    text = np.empty((len(keys), 2, n_text, latent_dim), np.float32)
    for i, (key, epoch) in enumerate(zip(keys.tolist(), epochs.tolist(), strict=True)):
        philox = [seed & 0xFFFFFFFF | epoch << 32, key]
        uniforms[i] = _generator(philox, 0).random(N_UNIFORMS, np.float32)
        if n_image:
            _generator(philox, IMAGE).standard_normal(out=image[i], dtype=np.float32)
        _generator(philox, TEXT).standard_normal(out=text[i], dtype=np.float32)
    return Draws(
        torch.from_numpy(uniforms).to(keys.device),
        torch.from_numpy(image).to(keys.device) if n_image else None,
        torch.from_numpy(text).to(keys.device),
    )


def _generator(key: list[int], stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))
