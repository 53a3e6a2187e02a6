"""Train an AutoencoderKL on published images, measure it and write its folder.

Shapes: n images of a set, B images of a batch, H x W pixels.
"""

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mdm import sources
from mdm.first_stage.autoencoder import Autoencoder, build, save, to_signed
from mdm.first_stage.image import decode_image
from mdm.sources.record import RawRecord
from mdm.utils.fields import NOT_NEGATIVE, POSITIVE, check_fields, doc
from mdm.utils.files import write_json
from mdm.utils.precision import autocast, describe, resolve

HELD_OUT = 20  # one image in so many, of sets that publish no held-out split
EDGE_WEIGHT = 0.5  # of differences of neighbouring pixels: L1 alone blurs strokes
_MEASURED = 1000  # images of a set that statistics and quality are taken of
_COLUMNS = 16  # of the grid of reconstructions


@dataclass(frozen=True)
class TrainAutoencoderConfig:
    """Flags."""

    datasets: tuple[str, ...] = doc(
        ("imagenet=runs/demo/data/digits", "journeydb=runs/demo/data/journeydb"),
        "name=folder; repeat it for each data set; sets without images do not belong here",
    )
    out: str = doc("runs/demo/autoencoder", "folder to write; replaced as a whole")
    image_size: int = doc(32, "pixels of a side; the model makes image_size / 4 latent cells of it")
    steps: int = doc(1200, "optimizer steps", POSITIVE)
    batch: int = doc(32, "images a step, an equal share from every set", POSITIVE)
    lr: float = doc(3e-3, "highest learning rate of the one-cycle schedule", POSITIVE)
    kl_weight: float = doc(1e-3, "weight of the KL term beside the reconstruction's L1")
    tone_weight: float = doc(
        4.0, "weight of squared errors of 2 x 2 means: L1 alone gives up rare colours", NOT_NEGATIVE
    )
    images: int = doc(20_000, "training images held in memory, a set", POSITIVE)
    precision: str = doc("auto", "of matrix products: bf16, fp32, or what this CPU is fast in")
    seed: int = doc(0, "seed of weights, order and noise")

    def __post_init__(self) -> None:
        check_fields(self)
        resolve(self.precision)
        sources.parse_datasets(self.datasets)


def load_images(
    name: str, root: Path, split: str, size: int, limit: int, held_out: bool | None = None
) -> tuple[Tensor, int]:
    """The first `limit` images of a split, uint8 [n, 3, size, size], and how many were bad.

    With `held_out`, only one image in HELD_OUT, by a hash of its bytes, or only the others. An
    image that consecutive records share counts once. Raises ValueError if no image is usable.
    """
    last: bytes | None = None
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    bad = 0
    for record in tqdm(sources.records(name, root, split), desc=f"{name} {split}", unit=" records"):
        if not isinstance(record, RawRecord) or record.image is None:
            bad += 1
            continue
        is_held_out = xxhash.xxh3_64_intdigest(record.image) % HELD_OUT == 0
        if record.image == last or held_out not in (None, is_held_out):
            continue
        last = record.image
        try:
            images.append(decode_image(record.image, size))
        except ValueError:
            bad += 1
        if len(images) == limit:
            break
    if not images:
        raise ValueError(f"dataset {name}: no usable image in split {split} of {root}")
    return torch.from_numpy(np.stack(images)), bad


def reconstruction_loss(output: Tensor, target: Tensor, tone_weight: float) -> Tensor:
    """L1 of pixels [B, 3, H, W] in [-1, 1] and of their differences, and squares of 2 x 2 means."""
    error = output - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    tone = functional.avg_pool2d(error, 2).square().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges + tone_weight * tone


def fit(
    model: nn.Module, images: Mapping[str, Tensor], config: TrainAutoencoderConfig
) -> list[dict[str, float]]:
    """Train an AutoencoderKL in place; each step's loss terms and the posterior's mean deviation.

    `images` are uint8 [n, 3, H, W] of each set. Every set fills the same share of a batch, so that
    small ones count.
    """
    precision = resolve(config.precision)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    # A rise over a tenth of 10 steps would be one of 0 steps, by which the schedule divides.
    rise = 0.1 if config.steps > 10 else 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.steps, pct_start=rise
    )
    vae = cast(Any, model.train())
    share = max(1, config.batch // len(images))
    history = []
    bar = tqdm(range(1, config.steps + 1), desc="autoencoder", unit=" steps")
    for step in bar:
        picks = [
            part[torch.randint(len(part), (share,), generator=generator)]
            for part in images.values()
        ]
        target = to_signed(torch.cat(picks))
        with autocast(precision):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = reconstruction_loss(output.float(), target, config.tone_weight)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + config.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        std = posterior.std.float().mean().item()
        term = {"reconstruction": loss.item(), "kl": kl.item(), "posterior_std": std}
        history.append({"step": step, **term})
        if step % 20 == 0:
            bar.set_postfix(l1=f"{term['reconstruction']:.3f}", kl=f"{term['kl']:.2f}")
    model.eval()
    return history


@torch.inference_mode()
def channel_statistics(model: nn.Module, images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation by channel of the posterior's mean, over images uint8 [n, 3, H, W]."""
    vae = cast(Any, model.eval())
    count = 0
    total = square = torch.zeros((), dtype=torch.float64)
    for part in images.split(256):
        cells = vae.encode(to_signed(part)).latent_dist.mode().double()
        total = total + cells.sum((0, 2, 3))
        square = square + cells.square().sum((0, 2, 3))
        count += cells.shape[0] * cells.shape[2] * cells.shape[3]
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.tolist(), std.tolist()


def evenly(images: Tensor, most: int) -> Tensor:
    """At most so many images, from the first to the last: sets may be sorted by class."""
    return images[torch.linspace(0, len(images) - 1, min(most, len(images))).long()]


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images f32 [n, 3, H, W] in [0, 1]."""
    error = functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def grid_image(sets: list[tuple[Tensor, Tensor]]) -> Image.Image:
    """Real images, each row above that of its reconstructions; f32 [n <= 16, 3, H, W] in [0, 1]."""
    rows = []
    for images in itertools.chain.from_iterable(sets):
        missing = (_COLUMNS - len(images)) * images.shape[3]
        rows.append(functional.pad(torch.cat([*images], 2), (0, missing), value=1.0))
    pixels = (torch.cat(rows, 1) * 255).round().byte().permute(1, 2, 0)
    page = Image.fromarray(pixels.numpy())
    return page.resize((2 * page.width, 2 * page.height), Image.Resampling.NEAREST)


def train(config: TrainAutoencoderConfig) -> dict[str, Any]:
    """Train, measure and publish; the report. ValueError if a data set has no usable images."""
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    model = build(config.image_size)
    train_sets: dict[str, Tensor] = {}
    heldout_sets: dict[str, Tensor] = {}
    bad = 0
    for name, root in sources.parse_datasets(config.datasets):
        key, size = root.name, config.image_size
        split = sources.training_splits(name, root)[0]
        # A set that publishes no held-out split is divided by a hash of its images.
        other = sources.held_out_split(name, root)
        parts = (None, None) if other else (False, True)
        train_sets[key], bad_train = load_images(name, root, split, size, config.images, parts[0])
        heldout_sets[key], bad_heldout = load_images(
            name, root, other or split, size, _MEASURED, parts[1]
        )
        bad += bad_train + bad_heldout if other else bad_train
    loaded = time.perf_counter()
    precision = resolve(config.precision)
    tqdm.write(f"precision: {describe(precision)}", file=sys.stderr)
    history = fit(model, train_sets, config)
    trained = time.perf_counter()
    measured = [evenly(images, _MEASURED) for images in train_sets.values()]
    mean, std = channel_statistics(model, torch.cat(measured))

    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".autoencoder-") as folder:
        partial = Path(folder) / "new"
        save(model, partial, mean, std)
        autoencoder = Autoencoder.load(partial)
        shown, quality = [], {}
        for key, images in heldout_sets.items():
            real, output = images.float() / 255, autoencoder.decode(autoencoder.encode(images))
            quality[key] = round(psnr(output, real), 2)
            shown.append((evenly(real, _COLUMNS), evenly(output, _COLUMNS)))
        grid_image(shown).save(partial / "reconstructions.png")
        report = {
            "sha256": autoencoder.sha256,
            "psnr": quality,
            "train_images": {key: len(images) for key, images in train_sets.items()},
            "bad_records": bad,
            "steps": config.steps,
            "precision": precision,
            "seconds": {
                "read": round(loaded - started, 1),
                "train": round(trained - loaded, 1),
                "all": round(time.perf_counter() - started, 1),
            },
            "images_per_second": round(config.steps * config.batch / (trained - loaded), 1),
            "latents_mean": mean,
            "latents_std": std,
            "losses": history[:: max(1, config.steps // 100)] + history[-1:],
        }
        write_json(partial / "autoencoder.json", report)
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    return report
