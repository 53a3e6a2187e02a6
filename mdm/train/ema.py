"""Averaged weights: sharded fp32 shadows of the optimizer's master weights, no communication."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """One or two exponential moving averages of this rank's fp32 partitions.

    The decay after n updates is min(decay, (1 + n) / (10 + n)), so that early weights fade quickly.
    `shadows` holds the averages by name, `ema` and `ema2`, in the shapes of the partitions.
    """

    def __init__(self, partitions: Sequence[Tensor], decay: float, second: float = 0.0) -> None:
        self.decays = {"ema": decay} | ({"ema2": second} if second else {})
        self.updates = 0
        self.shadows = {kind: [p.detach().clone() for p in partitions] for kind in self.decays}

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
