"""Averaged weights as a sharded fp32 shadow of the optimizer's master weights: no communication."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """Exponential moving averages over this rank's fp32 partitions: one, or a second beside it.

    decay_n = min(decay, (1 + n) / (10 + n)) after n updates, so that early weights fade quickly.
    """

    def __init__(self, partitions: Sequence[Tensor], decay: float, second: float = 0.0) -> None:
        self.decays = {"ema": decay} | ({"ema2": second} if second else {})
        self.updates = 0
        self.shadows = {kind: [p.detach().clone() for p in partitions] for kind in self.decays}

    @property
    def shadow(self) -> list[Tensor]:
        """The first average, live, shaped as the partitions."""
        return self.shadows["ema"]

    @property
    def nbytes(self) -> int:
        """Memory of all averages on this rank."""
        return sum(t.numel() * t.element_size() for ts in self.shadows.values() for t in ts)

    def update(self, partitions: Sequence[Tensor]) -> None:
        """Move the averages towards the weights; call only after an applied step."""
        for kind, shadow in self.shadows.items():
            decay = min(self.decays[kind], (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(shadow, list(partitions), 1.0 - decay)
        self.updates += 1
