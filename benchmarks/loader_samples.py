"""The samples of the loader benchmarks, the same in every format; needs only numpy.

A sample has a number, a latent of 256 x 16 numbers of 16 bits, 8 to 128 token ids and a class.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

SAMPLES = 20_000
BATCH = 64
TOKENS, CHANNELS = 256, 16
LENGTH = 128  # tokens of the longest text
CLASSES = 1000
VOCABULARY = 60_000
_CHUNK = 1000  # samples generated at a time


def samples() -> Iterator[tuple[int, NDArray[np.uint16], NDArray[np.uint16], int]]:
    """Yields (number, latent bits [256, 16], token ids, class) for each sample.

    The first two numbers of a latent and the first two token ids encode the sample's number, so
    that a batch can be checked without separate ids. All latents are finite in bfloat16 and fp16.
    """
    random = np.random.default_rng(0)
    for start in range(0, SAMPLES, _CHUNK):
        latents = random.integers(0x3800, 0x3C00, (_CHUNK, TOKENS, CHANNELS), dtype=np.uint16)
        lengths = random.integers(8, LENGTH + 1, _CHUNK)
        classes = random.integers(0, CLASSES, _CHUNK)
        for i in range(_CHUNK):
            number = start + i
            text = random.integers(5, VOCABULARY, lengths[i]).astype(np.uint16)
            text[:2] = number // 200 + 5, number % 200 + 5
            latents[i, 0, :2] = number // 200 + 0x3800, number % 200 + 0x3800
            yield number, latents[i], text, int(classes[i])


class Check:
    """Checks that a pass delivers every sample once, by the numbers in texts and latents."""

    def __init__(self) -> None:
        self.texts: list[NDArray[np.int64]] = []
        self.latents: list[NDArray[np.int64]] = []

    def add(self, tokens: NDArray[np.integer], first: NDArray[np.integer]) -> None:
        """Add a batch: token ids [B, 2 or more], bits [B, 2] of the latents' first two numbers."""
        self.texts.append((tokens[:, 0].astype(np.int64) - 5) * 200 + tokens[:, 1] - 5)
        bits = first.astype(np.int64) - 0x3800
        self.latents.append(bits[:, 0] * 200 + bits[:, 1])

    def finish(self) -> None:
        """RuntimeError unless every sample came once, texts fit latents, and order is random."""
        texts, latents = np.concatenate(self.texts), np.concatenate(self.latents)
        if not np.array_equal(np.sort(texts), np.arange(SAMPLES)):
            raise RuntimeError(f"{len(texts)} samples, {len(np.unique(texts))} different ones")
        if not np.array_equal(texts, latents):
            raise RuntimeError("texts and latents are of different samples")
        if np.mean(np.diff(texts) == 1) > 0.05:
            raise RuntimeError("the samples come in the order of storage")
