"""What the loader hands to the objective.

Shapes: B samples, N image tokens (rows x columns of the grid) of each of K images, M text tokens,
C numbers a latent. Packed texts lie in R rows of M tokens; elsewhere a sample is a row, R = B.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mdm.config import ModelConfig

TASKS = ("image_text", "text")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global step: one task, so that every rank runs the same modules."""

    ids: tuple[str, ...]  # sample ids, traceable to shard, row and origin
    keys: Tensor  # i64 [B], `sample_key` of each id: the noise's key
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
    # i64 [R, M] which sample a token of packed texts belongs to: counted row by row, each in one
    # row and without a gap, -1 after a row's last. None: row i is sample i.
    text_of: Tensor | None = None
    # Samples of the global batch a rank, over which packed texts' losses are averaged: a rank may
    # hold more or fewer.
    average_over: int = 0

    @property
    def task(self) -> str:
        """One of `TASKS`."""
        return TASKS[self.latents is None]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`, the latents in f32 once they are there."""
        moved = {
            k: getattr(self, k).to(device)
            for k in ("keys", "epochs", "class_ids", "tokens", "prompt")
        }
        for k in ("latents", "image_at", "text_of"):
            tensor = getattr(self, k)
            moved[k] = None if tensor is None else tensor.to(device)
        if moved["latents"] is not None:
            moved["latents"] = moved["latents"].float()
        return replace(self, **moved)

    def check(self, model: ModelConfig) -> None:
        """ValueError, with both values, unless shapes, kinds and ranges are those of `model`."""
        b, n = len(self.ids), model.image_height * model.image_width
        shape = tuple(self.tokens.shape)
        packed = self.text_of is not None
        rows = shape[0] if packed else b
        if len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= model.text_length:
            raise ValueError(
                f"tokens have shape {shape}; {b} samples need [{b}, 1 ... {model.text_length} "
                "(model.text_length)]"
            )
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": (shape, torch.int64),
            "prompt": (shape, torch.bool),
            **dict.fromkeys(("keys", "epochs", "class_ids"), ((b,), torch.int64)),
        }
        if packed:
            fields["text_of"] = (shape, torch.int64)
        if self.latents is not None:
            k = max(self.latents.shape[1] // n, 1) if self.latents.dim() == 3 else 1
            stored = self.latents.dtype == torch.bfloat16
            kind = torch.bfloat16 if stored else torch.float32
            fields["latents"] = ((b, k * n, model.latent_dim), kind)
            if self.image_at is not None:
                fields["image_at"] = ((b, k), torch.int64)
            if packed:
                raise ValueError("text_of tells the places of packed texts but there are latents")
        elif self.image_at is not None:
            raise ValueError("image_at tells the places of images but latents are None")
        self._check_fields(fields, shape, model)
        ranges = {
            "tokens": (0, model.vocab_size - 1, "the vocabulary of another tokenizer?"),
            "class_ids": (-1, model.n_classes - 1, "see model.n_classes"),
            "image_at": (-1, shape[1] - 1, "it counts text tokens"),
            "text_of": (-1, b - 1, "it counts the samples"),
        }
        for name, (low, high, hint) in ranges.items():
            value = getattr(self, name)
            if value is not None:
                self._check_range(name, value, low, high, hint)

    def _check_fields(
        self,
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]],
        shape: tuple[int, ...],
        model: ModelConfig,
    ) -> None:
        b, n = len(self.ids), model.image_height * model.image_width
        for name, (wanted, kind) in fields.items():
            value = getattr(self, name)
            if tuple(value.shape) != wanted or value.dtype != kind:
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape)}; {b} samples of {shape[1]} "
                    f"tokens on a grid of {n} x {model.latent_dim} need {kind} {wanted}"
                )

    def _check_range(self, name: str, value: Tensor, low: int, high: int, hint: str) -> None:
        outside = ((value < low) | (value > high)).view(len(value), -1)
        if outside.any():
            row = int(outside.any(1).nonzero()[0, 0])
            wrong = int(value.view(len(value), -1)[row][outside[row]][0])
            whose = self.ids[row] if self.text_of is None else f"of row {row}"
            raise ValueError(
                f"sample {whose} has {wrong} in {name}; it lies in {low} ... {high}: {hint}"
            )

    def nonfinite(self) -> tuple[str, ...]:
        """Ids of the samples whose latents are not all finite."""
        if self.latents is None:
            return ()
        finite = self.latents.isfinite().flatten(1).all(1).tolist()
        return tuple(i for i, ok in zip(self.ids, finite, strict=True) if not ok)


def sample_key(sample_id: str) -> int:
    """A 63-bit key of a sample's id, the same on every machine."""
    return int(sample_keys([sample_id]))


def sample_keys(sample_ids: Sequence[str]) -> Tensor:
    """i64 [B]: `sample_key` of each id."""
    hashed = bytearray().join(
        [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in sample_ids]
    )
    if not hashed:
        return torch.zeros(0, dtype=torch.int64)
    # As unsigned numbers, whose upper 63 bits are the key.
    return torch.from_numpy((np.frombuffer(hashed, "<u8") >> 1).astype(np.int64))
