"""One width of `width.py`: searches the best learning rate, in one process of one thread.

Tries rates a factor of 2 apart until the best has a worse one on both sides, and keeps the loss on
held-out digits of each in a file. Run again, it skips the finished trainings.
"""

from mdm.launch.job import job

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from examples.digits.short_run import ShortRun, heldout_batch, short_config
from mdm.config import doc
from mdm.first_stage.tokenizer import Tokenizer
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields
from mdm.utils.files import read_json, write_json

NOISES = 2  # of each held-out sample

Losses = Mapping[float, float]  # {learning rate: held-out loss}, infinite if it diverged


@dataclass(frozen=True)
class Setting:
    """What all trainings of a sweep share."""

    steps: int = doc(200, "optimizer steps of each training", POSITIVE)
    batch: int = doc(32, "samples per step", POSITIVE)
    n_layer: int = doc(4, "blocks", POSITIVE)
    rate: float = doc(2e-3, "the first learning rate at each width", POSITIVE)


@dataclass(frozen=True)
class Flags(Setting):
    """Flags of this job."""

    width: int = doc(64, "width of the residual stream", POSITIVE)
    seed: int = doc(0, "of weights, data and noise")
    data: str = doc("runs/learn/width/data", "folder of the tokenizer and the encoded data set")
    out: str = doc("runs/learn/width/64-0", "folder for a file of each learning rate")

    def __post_init__(self) -> None:
        check_fields(self)


def wanted(losses: Losses, start: float) -> list[float]:
    """The rates to try next: the best so far, at first `start`, and its neighbours."""
    best = min(losses, key=lambda rate: losses[rate]) if losses else start
    return [rate for rate in (best, best / 2, 2 * best) if rate not in losses]


def finished(folder: Path, setting: Setting) -> dict[float, float]:
    """The losses of the trainings with this setting that `folder` holds, by rate."""
    losses = {}
    for path in folder.glob("*.json"):
        kept = read_json(path, {"rate": float, "setting": dict})
        if kept and kept["setting"] == shared(setting):
            losses[kept["rate"]] = math.inf if kept["loss"] is None else float(kept["loss"])
    return dict(sorted(losses.items()))


def shared(setting: Setting) -> dict[str, float]:
    """The fields of `Setting` alone."""
    return {field.name: getattr(setting, field.name) for field in dataclasses.fields(Setting)}


def train(flags: Flags, rate: float) -> float:
    """The held-out loss of one training; may be infinite or NaN."""
    model = {"n_layer": flags.n_layer, "d_model": flags.width, "d_state": 16}
    schedule = {"steps": flags.steps, "lr": rate, "warmup": flags.steps // 5}
    data = Path(flags.data)
    config = short_config(data, model, schedule, batch=flags.batch, seed=flags.seed)
    with ShortRun(config) as run:
        name = f"width {flags.width}, seed {flags.seed}, rate {rate:g}"
        for _ in tqdm(range(flags.steps), desc=name, unit="step"):
            run.take_step()
    length = config.data.caption_length
    heldout = heldout_batch(Tokenizer(data / "tokenizer.model"), length, NOISES)
    run.loss.eval()
    with torch.no_grad():
        terms = run.loss(heldout, 0)
    # The decoder's terms: those of the VAE do not depend on its width.
    return float(terms.eps_img + config.objective.se_image * terms.se_img + terms.se_txt)


@job("learn_width_search", ValueError)
def main() -> None:
    """Run the job."""
    flags = parse_cli(Flags, description=__doc__ or "")
    torch.set_num_threads(1)
    folder = Path(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    while rates := wanted(finished(folder, flags), flags.rate):
        began = time.monotonic()
        loss = train(flags, rates[0])
        kept = {
            "rate": rates[0],
            "loss": loss if math.isfinite(loss) else None,
            "seconds": time.monotonic() - began,
            "setting": shared(flags),
        }
        write_json(folder / f"{rates[0]:.6g}.json", kept)


if __name__ == "__main__":
    sys.exit(main())
