"""Train an AutoencoderKL on published images, measure it and write its folder."""

import itertools
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mdm import sources
from mdm.config import doc
from mdm.first_stage import fit_autoencoder
from mdm.first_stage.autoencoder import Autoencoder, build, save
from mdm.first_stage.image import decode_image
from mdm.sources.record import RawRecord
from mdm.utils.files import write_json
from mdm.utils.precision import describe, resolve

HELD_OUT = 20  # one image in so many, of sets that publish no held-out split
_MAX_HELD_OUT = 1000  # held-out images of a set that are measured


@dataclass(frozen=True)
class TrainAutoencoderConfig:
    """Flags."""

    datasets: tuple[str, ...] = doc(
        ("imagenet=runs/demo/data/digits", "journeydb=runs/demo/data/emoji"),
        "name=folder; repeat it for each data set; sets without images do not belong here",
    )
    out: str = doc("runs/demo/autoencoder", "folder to write; replaced as a whole")
    image_size: int = doc(32, "pixels of a side; the model makes image_size / 4 latent cells of it")
    steps: int = doc(1200, "optimizer steps")
    batch: int = doc(32, "images a step, an equal share from every set")
    lr: float = doc(3e-3, "highest learning rate of the one-cycle schedule")
    kl_weight: float = doc(1e-3, "weight of the KL term beside the reconstruction's L1")
    images: int = doc(20_000, "training images held in memory, a set")
    precision: str = doc("auto", "of matrix products: bf16, fp32, or what this CPU is fast in")
    seed: int = doc(0, "seed of weights, order and noise")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "images"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        resolve(self.precision)
        sources.parse_datasets(self.datasets)


def is_held_out(image: bytes) -> bool:
    """One image in HELD_OUT, by a hash of its bytes."""
    return xxhash.xxh3_64_intdigest(image) % HELD_OUT == 0


def load_images(
    name: str, root: Path, split: str, size: int, limit: int, held_out: bool | None = None
) -> tuple[Tensor, int]:
    """The first `limit` images of a split, uint8 [n, 3, size, size], and how many were bad.

    With `held_out`, only the images for which `is_held_out` is that value. An image that
    consecutive records share counts once. Raises ValueError if no image is usable.
    """
    last: bytes | None = None
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    bad = 0
    for record in tqdm(sources.records(name, root, split), desc=f"{name} {split}", unit=" records"):
        if not isinstance(record, RawRecord) or record.image is None:
            bad += 1
            continue
        if record.image == last or held_out not in (None, is_held_out(record.image)):
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


def grid_image(sets: list[tuple[Tensor, Tensor]], columns: int = 16, scale: int = 2) -> Image.Image:
    """Rows of real images, each above the row of its reconstructions, f32 [n, 3, H, W] each."""
    rows = []
    for images in itertools.chain.from_iterable(sets):
        pixels = (images[:columns] * 255).round().to(torch.uint8)
        row = np.concatenate(list(pixels.permute(0, 2, 3, 1).numpy()), axis=1)
        missing = (columns - len(pixels)) * images.shape[3]
        rows.append(np.pad(row, ((0, 0), (0, missing), (0, 0)), constant_values=255))
    page = Image.fromarray(np.concatenate(rows))
    return page.resize((page.width * scale, page.height * scale), Image.Resampling.NEAREST)


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
            name, root, other or split, size, _MAX_HELD_OUT, parts[1]
        )
        bad += bad_train + bad_heldout if other else bad_train
    loaded = time.perf_counter()
    history: list[dict[str, float]] = []
    precision = resolve(config.precision)
    tqdm.write(f"precision: {describe(precision)}", file=sys.stderr)
    terms = fit_autoencoder.fit(
        model,
        train_sets,
        steps=config.steps,
        batch=config.batch,
        lr=config.lr,
        kl_weight=config.kl_weight,
        seed=config.seed,
        precision=precision,
    )
    with tqdm(terms, total=config.steps, desc="autoencoder", unit=" steps") as bar:
        for step, term in enumerate(bar, start=1):
            history.append({"step": step, **term})
            if step % 20 == 0:
                bar.set_postfix(l1=f"{term['reconstruction']:.3f}", kl=f"{term['kl']:.2f}")
    trained = time.perf_counter()
    mean, std = fit_autoencoder.channel_statistics(model, torch.cat(list(train_sets.values())))

    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".autoencoder-") as folder:
        partial = Path(folder) / "new"
        save(model, partial, mean, std)
        autoencoder = Autoencoder.load(partial)
        shown, psnr = [], {}
        for key, images in heldout_sets.items():
            real = images.float() / 255
            output = fit_autoencoder.reconstruct(autoencoder, images)
            psnr[key] = round(fit_autoencoder.psnr(output, real), 2)
            picks = torch.linspace(0, len(real) - 1, min(16, len(real))).long()
            shown.append((real[picks], output[picks]))
        grid_image(shown).save(partial / "reconstructions.png")
        report = {
            "sha256": autoencoder.sha256,
            "psnr": psnr,
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
