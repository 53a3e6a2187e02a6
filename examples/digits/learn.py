"""Trains the preset `learn` on 8 x 8 digits with captions, and measures what it has learnt.

Uses the same trainer, loss and solvers as any other run. DeepSpeed trains on two ranks, the
averaged weights generate, and an independent classifier judges. Writes `report.json` and
`report.html`.
"""

from mdm.launch.job import job

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo.stages import command, deepspeed, run_supervised
from examples.digits import data as digits
from examples.digits import report as learn_report
from examples.digits.evaluation import Ruler, Sampling, evaluate
from mdm.config import Config, doc
from mdm.evaluate import classifier
from mdm.first_stage.pixel_patches import PixelPatches
from mdm.first_stage.tokenizer import Tokenizer
from mdm.generate import Generator
from mdm.generate.loading import load_model
from mdm.launch.processes import CPU_ENV
from mdm.report.page import target_lines
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.files import load_json
from mdm.utils.saved_config import from_dict


@dataclass(frozen=True)
class Flags(Sampling):
    """Flags of this job."""

    out: str = doc("runs/learn", "folder for everything it writes")
    ranks: int = doc(2, "training processes")
    train_flags: str = doc("", "more flags for the training job, separated by spaces")
    seed: int = doc(0, "of training and of everything drawn")


@dataclass(frozen=True)
class Setting:
    """What all evaluations on one data set share."""

    ruler: Ruler
    pixels: PixelPatches
    folder: Path  # of the tokenizer and the encoded data set


def prepare(folder: Path) -> Setting:
    """Write the data set and train the classifier on the training images."""
    shutil.rmtree(folder, ignore_errors=True)
    train, heldout, pixels = digits.write(folder)

    def to_rgb(grey: Tensor) -> Tensor:
        return pixels.decode(pixels.encode(grey))

    judge = classifier.train(to_rgb(train.grey), train.labels, len(digits.WORDS), epochs=30)
    others = torch.linspace(0, len(train.labels) - 1, len(heldout.labels)).long()
    ruler = Ruler(
        judge,
        digits.NAMES,
        to_rgb(heldout.grey),
        to_rgb(train.grey[others]),
        pixels.encode(heldout.grey),
        heldout.labels,
        digits.captions,
    )
    return Setting(ruler, pixels, folder)


def training_job(setting: Setting, run_dir: Path, seed: int, more: str) -> list[str]:
    """The command that trains the preset, with `more` flags, separated by spaces."""
    data = {"data.root": setting.folder / "encoded"}
    tokenizer = setting.folder / "tokenizer.model"
    flags = {"preset": "learn", **data, "tokenizer": tokenizer, "run_dir": run_dir, "seed": seed}
    return [*command("pipelines/pretrain.py", **flags), *more.split()]


def load(export: Path, setting: Setting, compiled: bool = True) -> Generator:
    """The generator of exported weights, with pixel patches in place of an autoencoder."""
    config = from_dict(Config, load_json(export / "config.json"))
    tokenizer = Tokenizer(setting.folder / "tokenizer.model")
    return Generator(config, load_model(export, config, compiled), tokenizer, setting.pixels)


def run(flags: Flags) -> dict[str, Any]:
    """Write the data, train, evaluate and report; returns the content of `report.json`."""
    began, out = time.monotonic(), Path(flags.out)
    setting = prepare(out / "data")
    prepared = time.monotonic() - began
    train = training_job(setting, out / "train", flags.seed, flags.train_flags)[1:]
    if code := run_supervised([*deepspeed(flags.ranks), *train], CPU_ENV):
        fail(f"learn: the training job ended with exit code {code}; run it again to continue")
    done = load_json(out / "train" / "done.json")
    trained = time.monotonic()
    export = out / "train" / "export"
    metrics, images, labels = evaluate(load(export, setting), setting.ruler, flags, flags.seed)
    evaluated = time.monotonic() - trained
    report = metrics | {
        "train_seconds": done["wall_seconds"],
        "samples_per_second": done["samples_per_second"],
        "samples_seen": done["samples_seen"],
        "evaluate_seconds": evaluated,
        "wall_seconds": prepared + done["wall_seconds"] + evaluated,
    }
    return learn_report.write(out, report, images, labels, vars(flags))


@job("learn", ValueError)
def main() -> int:
    """Run the job; exit code 1 if a target is missed."""
    flags = parse_cli(Flags, description=__doc__ or "")
    report = run(flags)
    print(target_lines(report))
    print(f"{report['wall_seconds']:.0f} s; {flags.out}/report.json, {flags.out}/report.html")
    return 0 if all(report["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
