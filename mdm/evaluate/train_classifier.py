"""Training of the independent classifier that judges generated images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm import sources
from mdm.evaluate import classifier
from mdm.evaluate.heldout import Images, load_images
from mdm.evaluate.image import agreement
from mdm.first_stage.autoencoder import Autoencoder
from mdm.utils.fields import POSITIVE, check_fields, doc


@dataclass(frozen=True)
class Flags:
    """Flags of `train_classifier.py`."""

    classes: str = doc("imagenet=runs/demo/data/digits", "labelled data set: name=folder")
    others: tuple[str, ...] = doc(
        ("journeydb=runs/demo/data/journeydb",),
        "images of no class: name=folder, repeated for each data set; '' for none",
    )
    autoencoder: str = doc("runs/demo/autoencoder", "folder of the frozen autoencoder")
    out: str = doc("runs/demo/classifier", "folder to write")
    epochs: int = doc(7, "passes over the training images", POSITIVE)
    seed: int = doc(0, "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        check_fields(self)
        sources.parse_datasets([self.classes])
        if self.others:
            sources.parse_datasets(self.others)


def _load(datasets: Sequence[str], split: int, size: int) -> list[Images]:
    """Each data set's training (0) or held-out (1) images."""
    return [
        load_images(name, root, sources.get(name).SPLITS[split], size)
        for name, root in sources.parse_datasets(datasets)
    ]


def _thinned(sets: Sequence[Images], number: int) -> list[Images]:
    """About `number` images in all, as many of each set, evenly taken."""
    share = -(-number // len(sets))
    picks = [torch.linspace(0, len(s) - 1, min(share, len(s))).long() for s in sets]
    return [Images(s.pixels[p], s.labels[p]) for s, p in zip(sets, picks, strict=True)]


def run(flags: Flags) -> dict[str, float]:
    """Train the classifier, measure it, save it to `flags.out`, and return the report."""
    began = time.perf_counter()
    autoencoder = Autoencoder.load(flags.autoencoder)
    size = autoencoder.image_size
    train, heldout = (_load([flags.classes], i, size)[0] for i in (0, 1))
    others = _load(flags.others, 0, size) if flags.others else []
    n_classes = int(train.labels.max()) + 1
    loaded = time.perf_counter()
    if others:  # half as many as there are of the classes are enough
        others = _thinned(others, len(train) // 2)
    pixels = torch.cat([train.pixels, *(o.pixels for o in others)])
    labels = torch.cat([train.labels, *(torch.full_like(o.labels, -1) for o in others)])
    net = classifier.train(pixels, labels, n_classes, epochs=flags.epochs, seed=flags.seed)
    seconds = time.perf_counter() - loaded
    classes = heldout.labels.numpy()
    reconstructed = autoencoder.decode(autoencoder.encode(heldout.pixels))
    report = {
        "accuracy": agreement(net.judge(heldout.pixels)[0], classes),
        "accuracy_reconstructed": agreement(net.judge(reconstructed)[0], classes),
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
