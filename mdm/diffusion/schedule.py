"""Noise schedules: abar_t of Eq. 1 as float64 tables, and their log-SNR."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

STEPS = 1000  # T; t = 0 is clean data, t = T is pure noise


@dataclass(frozen=True, eq=False)
class Schedule:
    """`alphas_cumprod` float64 [T + 1], falling from 1 at t = 0 to 0 at t = T."""

    alphas_cumprod: Tensor

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Abar [...] in fp32 at integer steps t [...], 0 ... T."""
        return _tables(self, t.device)[0][t]

    def log_snr(self, t: Tensor) -> Tensor:
        """log(abar / (1 - abar)) [...] in fp32 at integer steps t [...]; infinite at 0 and T."""
        return _tables(self, t.device)[1][t]

    def log_snr_range(self) -> tuple[float, float]:
        """log-SNR at t = 1 and at t = T - 1, the ends of a solver's grid."""
        first, *_, last = self.log_snr(torch.arange(1, len(self.alphas_cumprod) - 1)).tolist()
        return first, last


@lru_cache(maxsize=16)
def _tables(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Abar and log-SNR of every step in fp32, copied once: a step must not wait for its device."""
    abar = schedule.alphas_cumprod
    log_snr = abar.log() - torch.log1p(-abar)
    return abar.float().to(device), log_snr.float().to(device)


def cosine() -> Schedule:
    """Abar = cos^2(pi/2 t/T) (Nichol & Dhariwal 2021, without offset)."""
    u = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    abar = torch.cos(u * torch.pi / 2) ** 2
    abar[0], abar[-1] = 1.0, 0.0
    return Schedule(abar)


def linear_log_snr(high: float, low: float) -> Schedule:
    """log-SNR falls linearly from `high` at t = 1 to `low` at t = T - 1.

    For text: a token becomes recognizable from its noisy latent between log-SNRs of about -5 and 2
    at width 16, and a linear DDPM schedule spends only a sixth of its steps there.
    """
    abar = torch.zeros(STEPS + 1, dtype=torch.float64)
    abar[0], abar[1:-1] = 1.0, torch.linspace(high, low, STEPS - 1, dtype=torch.float64).sigmoid()
    return Schedule(abar)


IMAGE = cosine()
TEXT = linear_log_snr(4.0, -7.0)


def noised(z_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps, Eq. 1; alpha_bar broadcasts against z_0."""
    return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps
