"""A learned time warp: noise levels are drawn where the loss changes (CDCD, Dieleman et al. 2022).

F(t) is the loss as a monotone function of the noise level, and levels are drawn with density F'(t).
Where a token is obvious, or cannot be recognized at all, F is flat and few levels are drawn.
"""

import math

import torch
import torch.distributed
from torch import Tensor, nn

from mdm.diffusion.schedule import STEPS

BINS = 50
FLAT = 0.25  # share of levels drawn uniformly, so that every bin is still measured
MOMENTUM = 0.05


class TimeWarp(nn.Module):
    """Maps uniforms to steps 1 ... T - 1. Its learned curve is a buffer, saved in checkpoints."""

    loss: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        # A straight line from certainty to guessing: uniform levels until losses have been seen.
        self.register_buffer("loss", torch.linspace(0.0, math.log(vocab_size), BINS))

    def steps(self, uniforms: Tensor) -> Tensor:
        """Steps i64 [b] in 1 ... T - 1 for uniforms [b] in [0, 1)."""
        slope = self.loss.double().cummax(0).values
        slope = torch.gradient(slope)[0].clamp(min=1e-9)
        density = (1 - FLAT) * slope / slope.sum() + FLAT / BINS
        edges = density.cumsum(0)
        u = uniforms.double() * edges[-1]
        bins = torch.searchsorted(edges, u, right=True).clamp(max=BINS - 1)
        inside = 1 - (edges[bins] - u) / density[bins]
        t = 1 + ((bins + inside) / BINS * (STEPS - 1)).long()
        return t.clamp(1, STEPS - 1)

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Update the loss curve from the global batch; all ranks must call this.

        Args:
            t: i64 [b] steps; those outside 1 ... T - 1 are ignored.
            losses: [b].
        """
        bins = ((t - 1) * BINS // (STEPS - 1)).clamp(0, BINS - 1)
        counted = ((t > 0) & (t < STEPS)).double()
        sums = self.loss.new_zeros(2, BINS, dtype=torch.float64)
        sums[0].index_add_(0, bins, losses.double() * counted)
        sums[1].index_add_(0, bins, counted)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        means = (sums[0] / sums[1].clamp(min=1)).to(self.loss.dtype)
        self.loss.copy_(torch.where(sums[1] > 0, self.loss.lerp(means, MOMENTUM), self.loss))
