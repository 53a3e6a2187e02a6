"""Solvers from noise to data on a uniform log-SNR grid: DPM-Solver++(2M), Heun's rule, ancestral.

With abar = sigmoid(log-SNR), alpha = sqrt(abar) and sigma = sqrt(1 - abar), a noisy latent is
z = alpha z_0 + sigma eps.

A solver has `levels`, float64 [evaluations]: the log-SNR at each evaluation, where z_0 is
estimated. Its `step(i, z, z_0)` returns the z of evaluation i + 1 from z of evaluation i and its
estimate z_0, of equal shapes. Evaluations are called in order, once each; the last one returns the
sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mdm.diffusion.schedule import Schedule

SOLVERS = ("dpmpp2m", "eq9", "ddpm")
LOW, HIGH = -9.0, 7.0  # log-SNR beyond which an evaluation has no effect


def log_snr_grid(schedule: Schedule, steps: int, noise_share: float = 1.0) -> Tensor:
    """Noise levels of `steps` evaluations, float64 [steps], from noise to data.

    With `noise_share` below 1 it begins at that share of the way from data to noise.

    Raises:
        ValueError: no steps.
    """
    if steps < 1:
        raise ValueError(f"sampling takes {steps} steps; at least 1 is needed")
    first, last = schedule.log_snr_range()
    low, high = max(last, LOW), min(first, HIGH)
    start = high + noise_share * (low - high)
    return torch.linspace(start, high, steps, dtype=torch.float64)


class DPMSolverPP2M:
    """Second-order multistep solver of the probability-flow ODE (Lu et al. 2022b).

    With lambda half the log-SNR, h = lambda' - lambda:

        z' = sigma'/sigma z - alpha' (e^-h - 1) D
        D = (1 + 1/2r) x_0 - 1/2r x_0^prev,   r = h^prev/h

    The first step is of first order; the last one returns the estimate itself.
    """

    def __init__(self, log_snr: Tensor) -> None:
        self.levels = log_snr
        self.half = log_snr.double() / 2
        self.alpha, self.sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        self.previous: Tensor | None = None

    def step(self, i: int, z: Tensor, z_0: Tensor) -> Tensor:
        """From level i to level i + 1."""
        if i == len(self.levels) - 1:
            return z_0
        h = float(self.half[i + 1] - self.half[i])
        direction = z_0
        if self.previous is not None:
            r = float(self.half[i] - self.half[i - 1]) / h
            direction = (1 + 1 / (2 * r)) * z_0 - 1 / (2 * r) * self.previous
        self.previous = z_0
        shrink = float(self.sigma[i + 1] / self.sigma[i])
        push = -float(self.alpha[i + 1]) * float(torch.expm1(torch.tensor(-h)))
        return shrink * z + push * direction


class Heun:
    """Eq. 9 (and 62): Heun's rule on the probability-flow ODE, two evaluations per step.

    The ODE is dz/dt = -beta/2 z + beta/2 (z - alpha x_0) / sigma^2. Eq. 58 has the wrong sign in
    the second term and lacks the first. With y = z/alpha and s = sigma/alpha (Karras et al. 2022),

        dy/ds = d(y, s) = (y - x_0)/s
        y~ = y + (s' - s) d(y, s),   y' = y + (s' - s)/2 (d(y, s) + d(y~, s'))

    The last step, to s = 0, is an Euler step and returns the estimate itself.
    """

    def __init__(self, log_snr: Tensor) -> None:
        # Levels after the first are evaluated twice: to correct a step and to predict the next.
        self.levels = torch.cat([log_snr[:1], log_snr[1:].repeat_interleave(2)])
        self.alpha, self.s = self.levels.sigmoid().sqrt(), (-self.levels / 2).exp()
        self.start: tuple[Tensor, Tensor] | None = None  # y and d at the start of the step

    def step(self, i: int, z: Tensor, z_0: Tensor) -> Tensor:
        """Predict at even evaluations and correct at odd ones."""
        if i == len(self.levels) - 1:
            return z_0
        y = z / float(self.alpha[i])
        slope = (y - z_0) / float(self.s[i])
        if i % 2 == 0:
            self.start = y, slope
            return float(self.alpha[i + 1]) * (y + float(self.s[i + 1] - self.s[i]) * slope)
        assert self.start is not None, "evaluations must be called in order"
        y, first = self.start
        return float(self.alpha[i]) * (y + float(self.s[i] - self.s[i - 1]) / 2 * (first + slope))


class Ancestral:
    """Ancestral sampling (Ho et al. 2020, Eq. 7): z' ~ q(z' | z, z_0 = x_0), the exact posterior.

    With a = alpha/alpha' and v = sigma^2 - a^2 sigma'^2:

        z' = a sigma'^2/sigma^2 z + alpha' v/sigma^2 x_0 + sigma' sqrt(v)/sigma noise
    """

    def __init__(self, log_snr: Tensor, noise: Callable[[int], Tensor]) -> None:
        self.levels, self.noise = log_snr, noise
        self.abar, self.variance = log_snr.sigmoid(), (-log_snr).sigmoid()

    def step(self, i: int, z: Tensor, z_0: Tensor) -> Tensor:
        """From level i to level i + 1."""
        if i == len(self.levels) - 1:
            return z_0
        a = (self.abar[i] / self.abar[i + 1]).sqrt()
        v = self.variance[i] - a**2 * self.variance[i + 1]
        keep = a * self.variance[i + 1] / self.variance[i]
        push = self.abar[i + 1].sqrt() * v / self.variance[i]
        spread = (self.variance[i + 1] * v / self.variance[i]).sqrt()
        return float(keep) * z + float(push) * z_0 + float(spread) * self.noise(i)


Solver = DPMSolverPP2M | Heun | Ancestral


def make_solver(
    name: str,
    table: Schedule,
    steps: int,
    noise: Callable[[int], Tensor],
    noise_share: float = 1.0,
) -> Solver:
    """A solver with at most `steps` evaluations, whatever its order.

    Args:
        name: one of `SOLVERS`.
        table: the noise schedule whose range the grid covers.
        steps: evaluations; Heun's rule uses an odd number of them.
        noise: evaluation -> standard normals of z's shape, for `ddpm`.
        noise_share: as of `log_snr_grid`.

    Raises:
        ValueError: too few steps.
    """
    if name == "dpmpp2m":
        return DPMSolverPP2M(log_snr_grid(table, steps, noise_share))
    if name == "eq9":
        if steps < 3:
            raise ValueError(f"sampling takes {steps} steps; solver eq9 needs at least 3")
        return Heun(log_snr_grid(table, (steps + 1) // 2, noise_share))
    assert name == "ddpm", name
    return Ancestral(log_snr_grid(table, steps, noise_share), noise)
