"""Trains the judge on real training scenes, and measures it on held-out ones.

`judge.json` says what it measures: on real images (`_real`), after the autoencoder (`_ceiling`),
and for shuffled texts (`_floor`). The evaluation of a model stands beside it, on the same prompts.
"""

from mdm.launch.job import job

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.scenes import heldout
from examples.scenes.bounds import bounds
from examples.scenes.data import written_with
from mdm.evaluate import classifier
from mdm.first_stage.autoencoder import Autoencoder
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields, doc
from mdm.utils.files import write_json


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    data: str = doc("runs/learn-scenes/data", "folder of the published scenes")
    autoencoder: str = doc("runs/learn-scenes/autoencoder", "folder of the frozen autoencoder")
    out: str = doc("runs/learn-scenes/judge", "folder to write")
    prompts: int = doc(200, "prompts of each of GenEval's tasks", POSITIVE)

    def __post_init__(self) -> None:
        check_fields(self)


def run(flags: Flags) -> dict[str, float]:
    """Train, measure and save; returns what was measured."""
    data, out = Path(flags.data), Path(flags.out)
    judge = heldout.train_judge(written_with(data))
    first_stage = Autoencoder.load(flags.autoencoder)
    report = bounds(heldout.setting(data, judge, first_stage, flags.prompts))
    report["prompts"] = flags.prompts
    classifier.save(judge.reader, out, {})
    write_json(out / "judge.json", report)
    return report


@job("train_judge", ValueError)
def main() -> None:
    """Run the job and print the numbers as one line of JSON."""
    report = run(parse_cli(Flags, description=__doc__ or ""))
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    sys.exit(main())
