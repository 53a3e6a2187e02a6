"""Evaluates exported weights on held-out scenes, all figures with their floors and ceilings.

`python examples/scenes/evaluate.py --checkpoint runs/learn-scenes/train/export`

Writes `metrics.json`, and sheets of images with their texts, into `--out`.
"""

from mdm.launch.job import job

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from examples.digits.evaluation import Sampling
from examples.scenes import heldout
from examples.scenes.evaluation import evaluate
from examples.scenes.judge import Judge
from mdm.diffusion.sampler import SOLVERS
from mdm.evaluate import classifier
from mdm.first_stage.autoencoder import Autoencoder
from mdm.generate import Generator
from mdm.report.page import save_tiles
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields, doc
from mdm.utils.files import load_json, write_json

SHOWN = 60  # tiles of a sheet


@dataclass(frozen=True)
class Flags(Sampling):
    """Flags of this job."""

    guidance: float = doc(4.0, "guidance weight of images")
    text_guidance: float = doc(0.0, "guidance weight of captions, answers and replies")
    joint_steps: int = doc(40, "solver steps of images and captions drawn together")
    solver: str = doc("ddpm", f"of images: one of {', '.join(SOLVERS)}")
    candidates: int = doc(
        1, "captions, answers and replies drawn; the most typical counts", POSITIVE
    )
    checkpoint: str = doc("runs/learn-scenes/train/export", "folder of exported weights")
    data: str = doc("runs/learn-scenes/data", "folder of the published scenes")
    judge: str = doc("runs/learn-scenes/judge", "folder of the judge's classifier")
    autoencoder: str = doc("runs/learn-scenes/autoencoder", "folder of the frozen autoencoder")
    out: str = doc("runs/learn-scenes/evaluation", "folder to write")
    joint: bool = doc(True, "draw images and captions together too")
    precision: str = doc("auto", "of matrix products: bf16, fp32, or what this CPU is fast in")

    def __post_init__(self) -> None:
        check_fields(self)


def run(flags: Flags) -> dict[str, float]:
    """Generate, judge and write everything into `--out`; returns the content of `metrics.json`."""
    began, out = time.perf_counter(), Path(flags.out)
    judge = Judge(classifier.load(Path(flags.judge)))
    first_stage = Autoencoder.load(flags.autoencoder)
    bounds = load_json(Path(flags.judge) / "judge.json", {"prompts": int})
    task = heldout.setting(Path(flags.data), judge, first_stage, bounds["prompts"])
    model = Generator.from_pretrained(
        flags.checkpoint,
        autoencoder=flags.autoencoder,
        compiled=True,
        precision=flags.precision,
        local_files_only=True,
    )
    result = evaluate(model, task, flags, flags.candidates, flags.joint)
    save_tiles(result.images, result.labels, out, SHOWN)
    metrics = bounds | result.metrics | {"seconds": time.perf_counter() - began}
    write_json(out / "metrics.json", metrics)
    return metrics


@job("evaluate_scenes", ValueError)
def main() -> None:
    """Run the job and print the numbers as one line of JSON."""
    report = run(parse_cli(Flags, description=__doc__ or ""))
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    sys.exit(main())
