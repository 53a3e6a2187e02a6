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

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if abar.dim() != 1 or len(abar) < 3:
            raise ValueError(
                f"alphas_cumprod has shape {tuple(abar.shape)}; it must be [T + 1], T >= 2"
            )
        falls = bool((abar.diff() < 0).all())  # False with a NaN anywhere
        if abar.dtype != torch.float64 or abar[0] != 1 or not falls or abar[-1] < 0:
            raise ValueError(
                f"alphas_cumprod must be float64, start at 1 and fall to 0 or more; it is "
                f"{abar.dtype} from {abar[0]:g} to {abar[-1]:g}"
            )

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


def cosine(steps: int = STEPS) -> Schedule:
    """Abar = cos^2(pi/2 t/T) (Nichol & Dhariwal 2021, without offset)."""
    u = torch.linspace(0, 1, max(steps, 0) + 1, dtype=torch.float64)
    abar = torch.cos(u * torch.pi / 2) ** 2
    abar[0], abar[-1] = 1.0, 0.0
    return Schedule(abar)


def linear_log_snr(high: float, low: float, steps: int = STEPS) -> Schedule:
    """log-SNR falls linearly from `high` at t = 1 to `low` at t = T - 1.

    For text: a token becomes recognizable from its noisy latent only between log-SNRs of about -5
    and 2 at width 16, and a linear DDPM schedule spends only a sixth of its steps there.
    """
    if low >= high:
        raise ValueError(f"log-SNR must fall; it goes from {high} to {low}")
    inner = torch.linspace(high, low, steps - 1, dtype=torch.float64).sigmoid()
    ends = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return Schedule(torch.cat([ends[0], inner, ends[1]]))


IMAGE = cosine()
TEXT = linear_log_snr(4.0, -7.0)


def noised(z_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps, Eq. 1; alpha_bar broadcasts against z_0."""
    return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps
