"""Does it learn? 8 x 8 digits with captions, through the very trainer, objective and sampler.

`make learn` trains the preset `learn` with DeepSpeed on two ranks, draws from the averaged
weights, lets an independent classifier judge, and writes `report.json` and `report.html`.
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

from examples.digits import data as learn_data
from examples.digits import report as learn_report
from examples.digits.evaluation import Ruler, Task, evaluate
from mdm.config import Config, doc, from_dict
from mdm.diffusion.sampler import SOLVERS
from mdm.evaluate import classifier
from mdm.first_stage.pixel_patches import PixelPatches
from mdm.first_stage.tokenizer import Tokenizer
from mdm.generate import Generator
from mdm.generate.loading import load_model
from mdm.launch.processes import CPU_ENV, supervised
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.files import load_json


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/learn", "folder for everything it writes")
    ranks: int = doc(2, "training processes")
    train_flags: str = doc("", "more flags for the training job, separated by spaces")
    guidance: float = doc(0.2, "guidance weight of images")
    joint_guidance: float = doc(1.0, "guidance weight of images and captions drawn together")
    steps: int = doc(20, "solver steps")
    solver: str = doc("dpmpp2m", f"of images: one of {', '.join(SOLVERS)}")
    text_solver: str = doc("ddpm", "of captions, and of images drawn with their captions")
    seed: int = doc(0, "of training and of everything drawn")


@dataclass(frozen=True)
class Setting:
    """What all evaluations of one data set share."""

    ruler: Ruler
    pixels: PixelPatches
    tokenizer: Path


def prepare(folder: Path) -> Setting:
    """Write the data, train the judge on the training images."""
    shutil.rmtree(folder, ignore_errors=True)
    train, heldout, pixels = learn_data.write(folder)

    def shown(grey: Tensor) -> Tensor:
        return pixels.decode(pixels.encode(grey))

    judge = classifier.train(shown(train.grey), train.labels, len(learn_data.WORDS), epochs=30)
    n = len(heldout.labels)
    others = torch.linspace(0, len(train.labels) - 1, n).long()
    task = Task(
        learn_data.NAMES,
        shown(heldout.grey),
        shown(train.grey[others]),
        pixels.encode(heldout.grey),
        heldout.labels,
        learn_data.captions,
    )
    return Setting(Ruler(judge, task), pixels, folder / "tokenizer.model")


def train(out: Path, data: Path, ranks: int, flags: list[str]) -> dict[str, float]:
    """Train the preset with the job that people use; what its `done` marker says."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        *(str(launcher), "--num_accelerators", str(ranks), "pipelines/pretrain.py"),
        *("--preset", "learn", "--data.root", str(data / "encoded"), "--run_dir", str(out)),
        *("--tokenizer", str(data / "tokenizer.model"), *flags),
    ]
    process = supervised(command, env=CPU_ENV)
    if code := process.wait():
        fail(f"learn: the training job ended with {code}; run it again to go on")
    done: dict[str, float] = load_json(out / "done.json")
    return done


def load(export: Path, setting: Setting, compiled: bool = True) -> Generator:
    """The generator of exported weights, with pixel patches in the autoencoder's place."""
    config = from_dict(Config, load_json(export / "config.json"))
    model = load_model(export, config, compiled)
    return Generator(config, model, Tokenizer(setting.tokenizer), setting.pixels)


def run(flags: Flags) -> dict[str, Any]:
    """Data, training, evaluation, report."""
    began, out = time.monotonic(), Path(flags.out)
    setting = prepare(out / "data")
    prepared = time.monotonic() - began
    more = ["--seed", str(flags.seed), *flags.train_flags.split()]
    done = train(out / "train", out / "data", flags.ranks, more)
    trained = time.monotonic()
    metrics, drawn = evaluate(
        load(out / "train" / "export", setting),
        setting.ruler,
        guidance=flags.guidance,
        joint_guidance=flags.joint_guidance,
        steps=flags.steps,
        solver=flags.solver,
        text_solver=flags.text_solver,
        seed=flags.seed,
    )
    report = metrics | {
        "train_seconds": done["wall_seconds"],
        "samples_per_second": done["samples_per_second"],
        "samples_seen": done["samples_seen"],
        "evaluate_seconds": time.monotonic() - trained,
        "wall_seconds": prepared + done["wall_seconds"] + time.monotonic() - trained,
    }
    return learn_report.write(out, report, setting.ruler.task, drawn, vars(flags))


@job("learn", ValueError)
def main() -> int:
    """Run the job."""
    flags = parse_cli(Flags, description=__doc__ or "")
    report = run(flags)
    for metric, ok in report["targets"].items():
        print(f"{'reached' if ok else 'MISSED ':8}{metric} = {report[metric]:.3f}")
    print(f"{report['wall_seconds']:.0f} s; {flags.out}/report.json, {flags.out}/report.html")
    return 0 if all(report["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
