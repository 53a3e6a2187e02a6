"""Trains the preset `learn_text` on English from packages, and measures bits per character.

Beside the diffusion stand a unigram, an autoregressive Transformer and a masked diffusion of the
project's own network, of one size and trained on the same rows as often. DeepSpeed trains the
diffusion on two ranks; the averaged weights of every model are measured on held-out files. Writes
`report.json` and `report.html`. An interrupted run continues where it was.
"""

from mdm.launch.job import job

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from examples.demo.stages import (
    JobStage,
    JobStageError,
    Runner,
    command,
    deepspeed,
    end_leftovers,
)
from examples.text import corpus, report
from examples.text.train import KINDS
from mdm.config import doc
from mdm.launch.processes import CPU_ENV
from mdm.presets import PRESETS
from mdm.report.page import target_lines
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields
from mdm.utils.saved_config import fingerprint

PRESET, DONE = "learn_text", "done.json"


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/learn-text", "folder for everything it writes")
    steps: int = doc(PRESETS[PRESET].train.steps, "training steps of every model", POSITIVE)
    ranks: int = doc(2, "training processes of the diffusion", POSITIVE)
    threads: int = doc(0, "CPU threads of the other jobs; 0: all cores")
    documents: int = doc(0, "documents of the corpus, for short runs; 0: all")
    train_flags: str = doc("", "more flags for all training jobs, separated by spaces")
    measure_flags: str = doc("", "more flags for measure.py, separated by spaces")
    seed: int = doc(0, "of training and of everything drawn")

    def __post_init__(self) -> None:
        check_fields(self)


def stages(flags: Flags) -> list[JobStage]:
    """The job stages in their order."""
    data = f"{flags.out}/data"
    given = [fingerprint(PRESETS[PRESET])]
    sources = [f"{name} {version(name)}" for name in (*corpus.PACKAGES, corpus.DIALOGUES)]
    common = {
        "preset": PRESET,
        "data.root": f"{data}/encoded",
        "tokenizer": f"{data}/tokenizer.model",
        "seed": flags.seed,
        "train.steps": flags.steps,
    }
    more = flags.train_flags.split()

    def training(name: str, script: str, **own: object) -> list[str]:
        return [*command(script, **common, run_dir=f"{flags.out}/{name}", **own), *more]

    def stage(name: str, title: str, words: list[str], launcher: Sequence[str] = ()) -> JobStage:
        folder = f"{flags.out}/{name}"
        report = Path(folder, DONE)
        return JobStage(name, title, words, given, [folder], report=report, launcher=launcher)

    diffusion = training("train", "pipelines/pretrain.py")[1:]
    own = {"rows": f"{data}/train.npz", "train.threads": flags.threads}
    baselines = {kind: training(kind, "examples/text/train.py", kind=kind, **own) for kind in KINDS}
    measure = command(
        "examples/text/measure.py", run=flags.out, threads=flags.threads, seed=flags.seed
    )
    return [
        JobStage(
            "data",
            "Write the corpus",
            command("examples/text/data.py", out=data, limit=flags.documents),
            sources,
            [data],
            report=Path(data, "data.json"),
        ),
        stage("train", "Train the diffusion", diffusion, deepspeed(flags.ranks)),
        *(stage(kind, f"Train the {kind} model", baselines[kind]) for kind in KINDS),
        JobStage(
            "measure",
            "Measure on held-out text",
            [*measure, *flags.measure_flags.split()],
            given,
            [f"{flags.out}/measure.json"],
            report=Path(flags.out, "measure.json"),
        ),
    ]


def run(flags: Flags) -> dict[str, Any]:
    """Run what is not finished, then write the report; returns the content of `report.json`."""
    folder = Path(flags.out) / "stages"
    end_leftovers(folder)
    env = {**CPU_ENV, "PYTHONPATH": os.getcwd()}
    if flags.threads:
        env["OMP_NUM_THREADS"] = str(flags.threads)
    markers = Runner(folder, env).run(stages(flags))
    return report.write(Path(flags.out), markers, vars(flags))


@job("learn_text", ValueError, PackageNotFoundError)
def main() -> int:
    """Run the job; exit code 1 if a target is missed."""
    flags = parse_cli(Flags, description=__doc__ or "")
    try:
        content = run(flags)
    except JobStageError as error:
        print(f"{error}; run it again to continue from there", file=sys.stderr)
        return 1
    print(report.table(content))
    print(target_lines(content))
    print(f"{content['wall_seconds']:.0f} s; {flags.out}/report.json, {flags.out}/report.html")
    return 0 if all(content["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
