"""What the loader hands to the objective.

Shapes: B samples, N image tokens (rows x columns of the grid) of each of K images, M text tokens,
C numbers a latent. Texts of packed samples lie in R rows of M tokens; elsewhere R = B.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mdm.config import ModelConfig
from mdm.model.inputs import check

TASKS = ("image_text", "text")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global step: one task, so that every rank runs the same modules."""

    ids: tuple[str, ...]  # sample ids, traceable to shard, row and origin
    keys: Tensor  # i64 [B], `sample_keys` of the ids: the noise's
    epochs: Tensor  # i64 [B], how often the sample's source has been passed before
    class_ids: Tensor  # i64 [B], -1 without a class
    tokens: Tensor  # i64 [R, M], text, EOS, then PAD
    prompt: Tensor  # bool [R, M], tokens given as a clean condition, never noised nor predicted
    # [B, K * N, C] first-stage latents of the images' patches, bf16 as they are stored until `to`
    # makes them f32; None for text alone.
    latents: Tensor | None
    # i64 [B, K] the text token at whose place an image stands, -1 for one beside the whole text;
    # None: all beside it.
    image_at: Tensor | None = None
    # i64 [R, M] which sample a text token of packed samples belongs to: counted row by row, each in
    # one row and without a gap, -1 after a row's last. None: row i is sample i.
    text_of: Tensor | None = None
    # Samples of the global batch a rank, over which packed samples' losses are averaged: a rank may
    # hold more or fewer.
    average_over: int = 0

    @property
    def task(self) -> str:
        """One of `TASKS`."""
        return TASKS[self.latents is None]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`, its latents in f32; keys and epochs stay: noise is drawn here."""
        names = ("class_ids", "tokens", "prompt", "latents", "image_at", "text_of")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        # A copy to a GPU needs no waiting: host memory that is not pinned is staged at once.
        wait = torch.device(device).type == "cpu"
        moved = {name: t.to(device, non_blocking=not wait) for name, t in tensors.items()}
        if "latents" in moved:
            moved["latents"] = moved["latents"].float()
        return replace(self, **moved)

    def check(self, model: ModelConfig) -> None:
        """ValueError, with both values, unless shapes, kinds and ranges are those of `model`."""
        check(model, **{k: v for k, v in vars(self).items() if k != "average_over"})

    def nonfinite(self) -> tuple[str, ...]:
        """Ids of the samples whose latents are not all finite."""
        if self.latents is None:
            return ()
        finite = self.latents.isfinite().flatten(1).all(1).tolist()
        return tuple(i for i, ok in zip(self.ids, finite, strict=True) if not ok)


def sample_keys(sample_ids: Sequence[str]) -> Tensor:
    """i64 [B]: a 63-bit key of each sample's id, the same on every machine."""
    hashed = b"".join([hashlib.blake2b(i.encode(), digest_size=8).digest() for i in sample_ids])
    # As unsigned numbers, whose upper 63 bits are the key.
    return torch.from_numpy((np.frombuffer(hashed, "<u8") >> 1).astype(np.int64))
