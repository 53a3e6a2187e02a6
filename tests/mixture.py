"""A mixture of Gaussians on the line: its denoiser and probability-flow map are known exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

SQRT2 = 2.0**0.5


@dataclass(frozen=True)
class Mixture:
    """Data sum_k w_k N(m_k, s_k^2); everything in float64."""

    weights: tuple[float, ...] = (0.3, 0.5, 0.2)
    means: tuple[float, ...] = (-1.4, 0.3, 1.6)
    stds: tuple[float, ...] = (0.3, 0.2, 0.4)

    def _at(self, abar: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and variances [k] of the noisy latent."""
        abar = torch.as_tensor(abar, dtype=torch.float64)
        w, m, s = torch.tensor([self.weights, self.means, self.stds], dtype=torch.float64)
        return w, abar.sqrt() * m, abar * s**2 + 1 - abar

    def estimate(self, z: Tensor, abar: Tensor | float) -> Tensor:
        """E[z_0 | z], what a perfect network predicts."""
        abar = torch.as_tensor(abar, dtype=torch.float64)
        w, noisy_mean, variance = self._at(abar)
        m, s = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.stds))
        away = z.double().unsqueeze(-1) - noisy_mean
        belongs = (w.log() - 0.5 * variance.log() - away**2 / (2 * variance)).softmax(-1)
        posterior_mean = (belongs * (m + abar.sqrt() * s**2 / variance * away)).sum(-1)
        return posterior_mean.to(z.dtype)

    def cdf(self, z: Tensor, abar: Tensor | float = 1.0) -> Tensor:
        """Of the latent at abar, of the data at 1."""
        w, m, variance = self._at(abar)
        return (w * 0.5 * (1 + torch.erf((z.unsqueeze(-1) - m) / (variance.sqrt() * SQRT2)))).sum(
            -1
        )

    def quantile(self, u: Tensor, abar: Tensor | float = 1.0) -> Tensor:
        """The inverse of `cdf`, by bisection."""
        low, high = torch.full_like(u, -20.0), torch.full_like(u, 20.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle, abar) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def flow(self, z: Tensor, start: Tensor | float, end: Tensor | float) -> Tensor:
        """Where the probability-flow ODE takes z from abar `start` to `end`.

        On the line the flow keeps every point's quantile.
        """
        return self.quantile(self.cdf(z, start), end)


def normal_quantiles(n: int) -> Tensor:
    """The n mid-quantiles of the standard normal, float64."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(u)
