"""The samples of the loader's benchmarks, the same in every format; needs numpy alone.

A sample: its number, a latent of 256 x 16 numbers of 16 bits, 8 to 128 token ids, a class.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

SAMPLES = 20_000
BATCH = 64
TOKENS, CHANNELS = 256, 16
LENGTH = 128  # of the longest text
CLASSES = 1000
VOCABULARY = 60_000
_BLOCK = 1000  # samples made at a time


def samples() -> Iterator[tuple[int, NDArray[np.uint16], NDArray[np.uint16], int]]:
    """(number, latent bits [256, 16], token ids, class) of each.

    The first four bits patterns of a latent and the first two token ids spell the number, so that
    a batch can be checked without any id beside it. All latents are finite in bfloat16 and fp16.
    """
    random = np.random.default_rng(0)
    for start in range(0, SAMPLES, _BLOCK):
        latents = random.integers(0x3800, 0x3C00, (_BLOCK, TOKENS, CHANNELS), dtype=np.uint16)
        lengths = random.integers(8, LENGTH + 1, _BLOCK)
        classes = random.integers(0, CLASSES, _BLOCK)
        for i in range(_BLOCK):
            number = start + i
            text = random.integers(5, VOCABULARY, lengths[i]).astype(np.uint16)
            text[:2] = number // 200 + 5, number % 200 + 5
            latents[i, 0, :2] = number // 200 + 0x3800, number % 200 + 0x3800
            yield number, latents[i], text, int(classes[i])


class Check:
    """That a pass delivers every sample once: by the numbers that texts and latents spell."""

    def __init__(self) -> None:
        self.texts: list[NDArray[np.int64]] = []
        self.latents: list[NDArray[np.int64]] = []

    def add(self, tokens: NDArray[np.integer], first: NDArray[np.integer]) -> None:
        """A batch: [B, 2 or more] token ids, and [B, 2] bits of the latents' first two numbers."""
        self.texts.append((tokens[:, 0].astype(np.int64) - 5) * 200 + tokens[:, 1] - 5)
        bits = first.astype(np.int64) - 0x3800
        self.latents.append(bits[:, 0] * 200 + bits[:, 1])

    def finish(self) -> None:
        """RuntimeError unless all were there once, whole, and not in the order of storage."""
        texts, latents = np.concatenate(self.texts), np.concatenate(self.latents)
        if not np.array_equal(np.sort(texts), np.arange(SAMPLES)):
            raise RuntimeError(f"{len(texts)} samples, {len(np.unique(texts))} different ones")
        if not np.array_equal(texts, latents):
            raise RuntimeError("texts and latents are of different samples")
        if np.mean(np.diff(texts) == 1) > 0.05:
            raise RuntimeError("the samples come in the order of storage")
