"""DPM-Solver++(2M) (Lu et al. 2022b) on a uniform log-SNR grid."""

import torch
from torch import Tensor

from mdm.diffusion.schedule import Schedule


def log_snr_grid(schedule: Schedule, steps: int, low: float = -9.0, high: float = 7.0) -> Tensor:
    """Noise levels of `steps` evaluations, float64 [steps], from noise to data.

    `low` and `high` cut the schedule's ends, where an evaluation changes nothing.

    Raises:
        ValueError: fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"sampling takes {steps} steps; a second-order solver needs at least 2")
    first, last = schedule.log_snr_range()
    return torch.linspace(max(last, low), min(first, high), steps, dtype=torch.float64)


class DPMSolverPP2M:
    """Second-order multistep solver of the probability-flow ODE for estimates of z_0.

    With lambda half the log-SNR, alpha = sqrt(abar), sigma = sqrt(1 - abar), h = lambda' - lambda:

        z' = sigma'/sigma z - alpha' (e^-h - 1) D
        D = (1 + 1/2r) x_0 - 1/2r x_0^prev,   r = h^prev/h

    The first step is of first order; the last returns the estimate itself.
    """

    def __init__(self, log_snr: Tensor) -> None:
        self.log_snr = log_snr
        self.half = log_snr.double() / 2
        self.alpha, self.sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        self.previous: Tensor | None = None

    def step(self, i: int, z: Tensor, z_0: Tensor) -> Tensor:
        """From level i to level i + 1, given the estimate `z_0` at `z`; shapes equal."""
        if i == len(self.log_snr) - 1:
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
