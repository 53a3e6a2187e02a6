"""Fit a small AutoencoderKL to images held in memory, and measure it.

Shapes: n images of a set, B images of a batch, H x W pixels.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdm.first_stage.autoencoder import Autoencoder, to_signed
from mdm.first_stage.folder import PATCH
from mdm.utils.precision import autocast

EDGE_WEIGHT = 0.5  # of differences of neighbouring pixels: L1 alone blurs strokes
TONE_WEIGHT = 4.0  # of squared errors of 2 x 2 means: L1 alone gives up rare colours


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels [B, 3, H, W] in [-1, 1] and of their differences, and squares of 2 x 2 means."""
    error = output - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    tone = functional.avg_pool2d(error, 2).square().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges + TONE_WEIGHT * tone


def fit(
    model: nn.Module,
    images: Mapping[str, Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    kl_weight: float,
    seed: int,
    precision: str,
) -> Iterator[dict[str, float]]:
    """Train `model` in place; yields each step's loss terms and the posterior's mean deviation.

    Args:
        model: an AutoencoderKL.
        images: uint8 [n, 3, H, W] of each set. Every set fills the same share of a batch, so that
            small ones count.
        steps: optimizer steps.
        batch: images a step.
        lr: highest learning rate of the one-cycle schedule.
        kl_weight: weight of the KL term.
        seed: seed of order and noise.
        precision: of matrix products, as `mdm.utils.precision.resolve` returns it.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    # A rise over a tenth of 10 steps would be one of 0 steps, by which the schedule divides.
    rise = 0.1 if steps > 10 else 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rise)
    vae = cast(Any, model.train())
    share = max(1, batch // len(images))
    for _ in range(steps):
        picks = [
            part[torch.randint(len(part), (share,), generator=generator)]
            for part in images.values()
        ]
        target = to_signed(torch.cat(picks))
        with autocast(precision):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = reconstruction_loss(output.float(), target)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield {
            "reconstruction": loss.item(),
            "kl": kl.item(),
            "posterior_std": posterior.std.float().mean().item(),
        }
    model.eval()


@torch.inference_mode()
def channel_statistics(
    model: nn.Module, images: Tensor, batch: int = 256
) -> tuple[list[float], list[float]]:
    """Mean and deviation by channel of the posterior's mean, over images uint8 [n, 3, H, W]."""
    vae = cast(Any, model.eval())
    count = 0
    total = square = torch.zeros((), dtype=torch.float64)
    for part in images.split(batch):
        cells = vae.encode(to_signed(part)).latent_dist.mode().double()
        total = total + cells.sum((0, 2, 3))
        square = square + cells.square().sum((0, 2, 3))
        count += cells.shape[0] * cells.shape[2] * cells.shape[3]
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.tolist(), std.tolist()


def reconstruct(autoencoder: Autoencoder, images: Tensor, batch: int = 256) -> Tensor:
    """Images uint8 [n, 3, H, W] encoded and decoded again: f32 [n, 3, H, W] in [0, 1]."""
    cell = PATCH * autoencoder.factor
    grid = (images.shape[2] // cell, images.shape[3] // cell)
    parts = [autoencoder.decode(autoencoder.encode(p), grid) for p in images.split(batch)]
    return torch.cat(parts)


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images f32 [n, 3, H, W] in [0, 1]."""
    error = functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())
