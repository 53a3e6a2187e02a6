"""What the contestants of the loader benchmarks share; needs only numpy and torch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.loader_samples import BATCH, CHANNELS, LENGTH, SAMPLES, TOKENS

SEED = 7
STEPS = SAMPLES // BATCH  # full batches; the rest of a pass is a shorter one
NUMBERS = TOKENS * CHANNELS

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # ids [B, LENGTH], latents [B, N, C]


class Contestant:
    """A loader: `open(pass)` yields the batches of a pass, `resume()` those of its second half."""

    # Builds everything and yields the batches of a pass; every pass starts with an empty cache.
    open: Callable[[int], Batches]
    resume: Callable[[], Batches] | None = None
    close: Callable[[], None] = staticmethod(lambda: None)


def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The collate function of every peer: padded ids, stacked latents, and the classes."""
    tokens = np.zeros((len(rows), LENGTH), np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row["tokens"])] = row["tokens"]
    latents = np.stack([row["latents"] for row in rows]).reshape(len(rows), TOKENS, CHANNELS)
    torch.tensor([int(row["class_id"]) for row in rows])
    return torch.from_numpy(tokens), torch.from_numpy(latents)
