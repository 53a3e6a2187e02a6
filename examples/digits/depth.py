"""Norms by depth at 49 narrow blocks: is anything lost or blown up on the way through?

Trains the preset `learn` with 49 blocks on the 8 x 8 digits for 200 steps, with both scan modes,
with long skips and without, and measures every block at the start and at the end. Exit code 1 if a
bound is exceeded. Run again, it skips the finished trainings.
"""

from mdm.launch.job import job

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.digits.ablation_tables import markdown
from examples.digits.short_run import ShortRun, short_config, write_data
from mdm.config import doc
from mdm.data.batch import Batch
from mdm.loss import Loss
from mdm.report.charts import line_panels
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import POSITIVE, check_fields
from mdm.utils.files import read_json, write_json

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    f"{mode}{', long skips' if skip else ''}": {"scan_mode": mode, "long_skip": skip}
    for mode in ("separate", "alternate")
    for skip in (False, True)
}
QUANTITIES = {
    "stream": "stream after the block, RMS",
    "branch": "what the block adds, RMS",
    "stream_gradient": "gradient of the stream, RMS",
    "weight_gradient": "gradient of the block's weights, norm",
}
TIMES = ("start", "end")
# Largest value of any block over the smallest, for each quantity.
BOUNDS = {"stream": 4.0, "branch": 10.0, "stream_gradient": 10.0, "weight_gradient": 10.0}


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/learn/depth", "folder for everything it writes")
    n_layer: int = doc(49, "blocks", POSITIVE)
    d_model: int = doc(64, "width of the residual stream", POSITIVE)
    steps: int = doc(200, "optimizer steps of each training", POSITIVE)
    batch: int = doc(8, "samples per step", POSITIVE)
    lr: float = doc(1e-3, "learning rate after a warm-up over a fifth of the steps", POSITIVE)
    seed: int = doc(0, "of weights, data and noise")

    def __post_init__(self) -> None:
        check_fields(self)


def norms(loss: Loss, batch: Batch) -> dict[str, list[float]]:
    """Each of `QUANTITIES` for every block, under the loss of `batch`; changes nothing."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append((inputs[0].detach(), output))

    blocks = loss.network.trunk.blocks
    hooks = [block.register_forward_hook(watch) for block in blocks]
    was_training = loss.training
    try:
        loss.eval()
        loss(batch, 0).total.backward()
    finally:
        loss.train(was_training)
        for hook in hooks:
            hook.remove()
    outputs = [output for _, output in seen]
    gradients = [[p.grad for p in block.parameters() if p.grad is not None] for block in blocks]
    measured = {
        "stream": [_rms(x) for x in outputs],
        "branch": [_rms(after - before) for before, after in seen],
        "stream_gradient": [_rms(x.grad) for x in outputs if x.grad is not None],
        "weight_gradient": [float(nn.utils.get_total_norm(of_block)) for of_block in gradients],
    }
    loss.zero_grad()
    return measured


def _rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def measure(flags: Flags, name: str, data: Path) -> dict[str, Any]:
    """Train one of `ARRANGEMENTS`; {time: norms, "loss": of the last tenth of the steps}.

    The start is after the first step: before it the heads are zero, and no gradient passes them.
    """
    path = Path(flags.out) / f"{name.replace(', ', '-').replace(' ', '-')}.json"
    settings = vars(flags)
    if (former := read_json(path, {"flags": dict})) and former["flags"] == settings:
        return former
    size = {"n_layer": flags.n_layer, "d_model": flags.d_model, "d_state": 16}
    train = {"steps": flags.steps, "lr": flags.lr, "warmup": flags.steps // 5, "decay": "constant"}
    config = short_config(
        data, size | ARRANGEMENTS[name], train, batch=flags.batch, seed=flags.seed
    )
    with ShortRun(config) as run:
        probe = next(run.loader)
        losses = [run.take_step()]
        start = norms(run.loss, probe)
        for _ in tqdm(range(flags.steps - 1), desc=name, unit="step"):
            losses.append(run.take_step())
        result: dict[str, Any] = {"start": start, "end": norms(run.loss, probe)}
    last = losses[-max(1, len(losses) // 10) :]
    result |= {"loss": sum(last) / len(last), "flags": settings}
    write_json(path, result)
    return result


def spreads(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Largest over smallest value of any block, {arrangement: {time: {quantity: ratio}}}."""
    return {
        name: {
            time: {key: max(result[time][key]) / min(result[time][key]) for key in QUANTITIES}
            for time in TIMES
        }
        for name, result in results.items()
    }


def exceeded(ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """A line for each ratio that is above its bound, or not a number."""
    return [
        f"{name}, {time}: {QUANTITIES[key]}: largest / smallest {ratio:.3g}, bound {BOUNDS[key]:g}"
        for name, by_time in ratios.items()
        for time, by_key in by_time.items()
        for key, ratio in by_key.items()
        if not ratio <= BOUNDS[key]
    ]


def depths(n_layer: int) -> list[int]:
    """Five blocks from first to last, counted from 1."""
    return sorted({1 + round(share * (n_layer - 1)) for share in (0, 0.23, 0.5, 0.75, 1)})


def table(results: Mapping[str, Mapping[str, Any]], n_layer: int) -> str:
    """Values at some depths, and the ratio of largest to smallest over all, as Markdown."""
    shown, ratios = depths(n_layer), spreads(results)
    rows = []
    for key, title in QUANTITIES.items():
        for name, result in results.items():
            for time in TIMES:
                values: Sequence[float] = result[time][key]
                cells = [f"{values[depth - 1]:.2g}" for depth in shown]
                rows.append([title, name, time, *cells, f"{ratios[name][time][key]:.2f}"])
    heads = [f"block {depth}" for depth in shown]
    return markdown(["quantity", "arrangement", "time", *heads, "largest / smallest"], rows)


def chart(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every quantity at both times by depth, a line for each arrangement, as SVG."""
    panels: dict[str, dict[str, dict[float, float]]] = {
        f"{title}, {time}": {
            name: dict(enumerate(result[time][key], start=1)) for name, result in results.items()
        }
        for key, title in QUANTITIES.items()
        for time in TIMES
    }
    return line_panels(panels, "Norms by depth", "block", columns=len(TIMES))


@job("learn_depth", ValueError)
def main() -> int:
    """Run the job; exit code 1 if a bound is exceeded."""
    flags = parse_cli(Flags, description=__doc__ or "")
    torch.set_num_threads(1)
    out = Path(flags.out)
    write_data(out / "data")
    results = {name: measure(flags, name, out / "data") for name in ARRANGEMENTS}
    write_json(out / "depth.json", {"flags": dataclasses.asdict(flags), "arrangements": results})
    (out / "depth.svg").write_text(chart(results), encoding="utf-8")
    print(table(results, flags.n_layer))
    print(
        "loss over the last tenth: " + ", ".join(f"{k} {v['loss']:.3f}" for k, v in results.items())
    )
    for line in (beyond := exceeded(spreads(results))):
        print(f"beyond its bound: {line}")
    print(f"{out}/depth.json, {out}/depth.svg")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
