"""Train the independent judge of the demo's images on real ones, and measure it.

Writes `classifier.safetensors` and `classifier.json`: its accuracy on held-out images, as they
are and through the autoencoder, and how many other images it takes for a class.
"""

from mdm.launch.job import job

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm import sources
from mdm.config import doc
from mdm.evaluate import classifier
from mdm.evaluate.heldout import Images, load_images
from mdm.evaluate.image import agreement
from mdm.first_stage.autoencoder import Autoencoder
from mdm.storage import StoreError
from mdm.storage.lease import hold_folder
from mdm.utils.command_line import parse_cli


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    classes: str = doc("imagenet=runs/demo/data/digits", "labelled data set, as name=folder")
    others: tuple[str, ...] = doc(
        ("journeydb=runs/demo/data/emoji",),
        "images of no class, as name=folder; repeat it for each data set; '' for none",
    )
    autoencoder: str = doc("runs/demo/autoencoder", "folder of the frozen autoencoder")
    out: str = doc("runs/demo/classifier", "folder to write")
    epochs: int = doc(7, "passes over the training images")
    seed: int = doc(0, "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        sources.parse_datasets([self.classes])
        if self.others:
            sources.parse_datasets(self.others)
        if self.epochs < 1:
            raise ValueError(f"--epochs is {self.epochs}; it must be positive")


def _load(datasets: Sequence[str], split: int, size: int) -> list[Images]:
    """Each data set's training (0) or held-out (1) images."""
    return [
        load_images(name, root, sources.get(name).SPLITS[split], size)
        for name, root in sources.parse_datasets(datasets)
    ]


def run(flags: Flags) -> dict[str, float]:
    """Train, measure, save; the report."""
    began = time.perf_counter()
    autoencoder = Autoencoder.load(flags.autoencoder)
    size = autoencoder.image_size
    train, heldout = (_load([flags.classes], i, size)[0] for i in (0, 1))
    others = _load(flags.others, 0, size) if flags.others else []
    n_classes = int(train.labels.max()) + 1
    loaded = time.perf_counter()
    pixels = torch.cat([train.pixels, *(o.pixels for o in others)])
    labels = torch.cat([train.labels, *(torch.full_like(o.labels, -1) for o in others)])
    net = classifier.train(pixels, labels, n_classes, epochs=flags.epochs, seed=flags.seed)
    seconds = time.perf_counter() - loaded
    wanted = heldout.labels.numpy()
    reconstructed = torch.cat(
        [autoencoder.decode(autoencoder.encode(p)) for p in torch.split(heldout.pixels, 250)]
    )
    report = {
        "accuracy": agreement(net.judge(heldout.pixels)[0], wanted),
        "accuracy_reconstructed": agreement(net.judge(reconstructed)[0], wanted),
        "images": float(len(pixels)),
        "heldout": float(len(heldout)),
        "samples_per_second": flags.epochs * len(pixels) / seconds,
        "seconds": time.perf_counter() - began,
    }
    if flags.others:
        unseen = torch.cat([o.pixels for o in _load(flags.others, 1, size)])
        report["others_taken_for_a_class"] = float((net.judge(unseen)[0] < n_classes).mean())
    classifier.save(net, Path(flags.out), report)
    return report


@job("train_classifier", StoreError, ValueError)
def main() -> int:
    """Train and print the report."""
    flags = parse_cli(Flags, description=__doc__ or "")
    with hold_folder(Path(flags.out), "train_classifier.py"):
        report = run(flags)
    print(json.dumps({k: round(v, 4) for k, v in report.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
