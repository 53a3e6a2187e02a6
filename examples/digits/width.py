"""How the best learning rate moves with width, on the task of `examples/digits/learn.py`.

Trains the preset `learn` briefly at several widths. At each, learning rates a factor of 2 apart are
tried until the best has a worse one on both sides. A power of the width is fitted to the best rates
and continued to 2048. Run again, it skips the finished trainings.
"""

from mdm.launch.job import job

import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from examples.demo.stages import command
from examples.digits.ablation_tables import markdown
from examples.digits.short_run import write_data
from examples.digits.width_search import Losses, Setting, finished, shared, wanted
from mdm.config import doc
from mdm.launch.processes import CPU_ENV, supervised
from mdm.presets import MDM_7B
from mdm.report.charts import line_panels
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields
from mdm.utils.files import write_json


@dataclass(frozen=True)
class Flags(Setting):
    """Flags of this job."""

    out: str = doc("runs/learn/width", "folder for everything it writes")
    widths: str = doc("64,128,256,512", "widths, separated by commas")
    seeds: int = doc(2, "seeds of the two smallest widths; the others have one", POSITIVE)
    jobs: int = doc(2, "trainings at once, of one thread each", POSITIVE)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(width, seed) of every search, the longest first."""
        widths = sorted(int(width) for width in self.widths.split(","))
        return [
            (width, seed)
            for width in reversed(widths)
            for seed in range(self.seeds if width in widths[:2] else 1)
        ]


class Law(NamedTuple):
    """Best rate = exp(intercept) x width^-alpha."""

    alpha: float
    error: float  # standard error of alpha; NaN for two points
    intercept: float

    def rate(self, width: int) -> float:
        """The best rate at `width`."""
        return float(math.exp(self.intercept) * width**-self.alpha)


def best_rate(losses: Losses) -> float:
    """The vertex of the parabola in log rate through the best rate and its neighbours.

    The best rate itself if a neighbour diverged.
    """
    best = min(losses, key=lambda rate: losses[rate])
    near = [best / 2, best, 2 * best]
    values = [losses[rate] for rate in near]
    if not np.isfinite(values).all():
        return best
    square, slope, _ = np.polyfit([-1.0, 0.0, 1.0], values, 2)
    return float(best * 2 ** (-slope / (2 * square))) if square > 0 else best


def power_law(points: Sequence[tuple[int, float]]) -> Law:
    """The law through (width, best rate), by least squares in logarithms."""
    widths, rates = zip(*points, strict=True)
    line = stats.linregress(np.log(widths), np.log(rates))
    return Law(-float(line.slope), float(line.stderr), float(line.intercept))


def search(flags: Flags, width: int, seed: int) -> dict[float, float]:
    """The losses of all rates that were tried at a width."""
    folder = Path(flags.out) / f"{width}-{seed}"
    if wanted(finished(folder, flags), flags.rate):
        values = shared(flags) | {"width": width, "seed": seed, "out": folder}
        job = command("examples/digits/width_search.py", data=f"{flags.out}/data", **values)
        env = {**CPU_ENV, "OMP_NUM_THREADS": "1"}
        if code := supervised(job, env=env).wait():
            raise RuntimeError(f"width {width}, seed {seed}: the search ended with code {code}")
    return finished(folder, flags)


def table(searches: Mapping[tuple[int, int], Losses]) -> str:
    """The loss of every rate tried and the best rate, a row for each width and seed, Markdown."""
    rates = sorted({rate for losses in searches.values() for rate in losses})
    rows = [
        [
            str(width),
            str(seed),
            *(f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates),
            f"{best_rate(losses):.2e}",
        ]
        for (width, seed), losses in sorted(searches.items())
    ]
    return markdown(["width", "seed", *(f"{rate:.3g}" for rate in rates), "best rate"], rows)


def chart(searches: Mapping[tuple[int, int], Losses]) -> str:
    """Loss by rate, a panel for each seed and a line for each width, as SVG."""
    panels: dict[str, dict[str, dict[float, float]]] = {}
    for (width, seed), losses in sorted(searches.items()):
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        panels.setdefault(f"held-out loss, seed {seed}", {})[f"width {width}"] = finite
    title = "Loss by learning rate"
    return line_panels(panels, title, "learning rate", columns=2, logarithmic=True)


def summary(law: Law, preset_rate: float, preset_width: int) -> str:
    """What the law says about the preset's rate, one line."""
    best = law.rate(preset_width)
    return (
        f"best rate = {math.exp(law.intercept):.3g} x width^-alpha, alpha = {law.alpha:.2f} "
        f"± {law.error:.2f}; at width {preset_width} {best:.2g}, "
        f"{best / preset_rate:.1f} times the preset's {preset_rate:g}"
    )


@job("learn_width", ValueError, RuntimeError)
def main() -> None:
    """Run the job and print the table."""
    flags = parse_cli(Flags, description=__doc__ or "")
    out = Path(flags.out)
    write_data(out / "data")
    with ThreadPoolExecutor(flags.jobs) as pool:
        found: list[dict[float, float]] = list(
            pool.map(lambda run: search(flags, *run), flags.runs)
        )
    searches = dict(zip(flags.runs, found, strict=True))
    best = [(width, best_rate(losses)) for (width, _), losses in searches.items()]
    law = power_law(best)
    report: dict[str, Any] = {
        "flags": vars(flags),
        "losses": [
            {"width": width, "seed": seed, "rate": rate, "loss": loss}
            for (width, seed), losses in searches.items()
            for rate, loss in losses.items()
            if math.isfinite(loss)
        ],
        "best": best,
        "law": law._asdict(),
    }
    write_json(out / "width.json", report)
    (out / "width.svg").write_text(chart(searches), encoding="utf-8")
    print(table(searches))
    print(summary(law, MDM_7B.train.lr, MDM_7B.model.d_model))
    print(f"{out}/width.json, {out}/width.svg")


if __name__ == "__main__":
    sys.exit(main())
