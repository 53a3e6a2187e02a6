"""Averaged weights as a sharded fp32 shadow of the optimizer's master weights: no communication."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """Exponential moving average over this rank's fp32 partitions.

    decay_n = min(decay, (1 + n) / (10 + n)) after n updates, so that early weights fade quickly.
    """

    def __init__(self, partitions: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = [p.detach().clone() for p in partitions]

    def update(self, partitions: Sequence[Tensor]) -> None:
        """Move the shadow towards the weights; call only after an applied step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, list(partitions), 1.0 - decay)
        self.updates += 1

    def load(self, shadow: Sequence[Tensor], updates: int) -> None:
        """Continue from saved partitions of the same shapes."""
        saved, own = [tuple(s.shape) for s in shadow], [tuple(s.shape) for s in self.shadow]
        if saved != own:
            raise ValueError(f"averaged weights have partitions {saved}, this run has {own}")
        for mine, theirs in zip(self.shadow, shadow, strict=True):
            mine.copy_(theirs)
        self.updates = updates
