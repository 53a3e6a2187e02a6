"""What the loader hands to the objective.

Shapes: B samples, N image tokens (rows x columns of the grid), M text tokens, C numbers a latent.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global step: one task, so that every rank runs the same modules."""

    ids: tuple[str, ...]  # sample ids, traceable to shard, row and origin
    keys: Tensor  # i64 [B], `sample_key` of each id: the noise's key
    epochs: Tensor  # i64 [B], how often the sample's source has been passed before
    class_ids: Tensor  # i64 [B], -1 without a class
    tokens: Tensor  # i64 [B, M], text, EOS, then PAD
    prompt: Tensor  # bool [B, M], tokens given as a clean condition, never noised nor predicted
    latents: (
        Tensor | None
    )  # f32 [B, N, C] first-stage latents of the picture's patches; None for text alone

    @property
    def task(self) -> str:
        """`image_text` or `text`."""
        return "text" if self.latents is None else "image_text"

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`."""
        moved = {
            k: getattr(self, k).to(device)
            for k in ("keys", "epochs", "class_ids", "tokens", "prompt")
        }
        latents = None if self.latents is None else self.latents.to(device)
        return replace(self, **moved, latents=latents)


def sample_key(sample_id: str) -> int:
    """A 63-bit key of a sample's id, the same on every machine."""
    return (
        int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little") >> 1
    )
