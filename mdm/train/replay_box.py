"""Records of skipped steps, and replaying one of them sample by sample.

run_dir/replay_boxes/step-00000123/
  report.json          reason, losses of every rank, norm, statistics, sample ids, noise keys
  batch.pt             the global batch
  model.safetensors    weights and buffers before the step (in the newest boxes only)
  config.json
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mdm.checkpoint.state import RunError
from mdm.config import Config
from mdm.data.batch import Batch
from mdm.first_stage.tokenizer import PAD
from mdm.storage.tensor_file import save_tensors
from mdm.utils import files
from mdm.utils.precision import autocast, resolve
from mdm.utils.saved_config import from_dict, to_dict

SHOWN = 5  # samples
WEIGHTS = "model.safetensors"
_TENSORS = tuple(f.name for f in fields(Batch) if f.name not in ("ids", "average_over"))
_OLD_FOLDER, _OLD_NAMES = "blackbox", {"picture_at": "image_at"}  # of former versions


def box_of(run_dir: Path, step: int) -> Path:
    """The replay box of step `step`."""
    return run_dir / "replay_boxes" / f"step-{step:08d}"


def join(batches: list[Batch]) -> Batch:
    """The global batch of all ranks' shares, on the host."""
    parts = [batch.to("cpu") for batch in batches]
    joined: dict[str, Any] = {
        "ids": tuple(i for part in parts for i in part.ids),
        "average_over": sum(part.average_over for part in parts),
    }
    for name in _TENSORS:
        values = [getattr(part, name) for part in parts]
        if name == "text_of" and values[0] is not None:  # indices of samples, over all ranks
            before = itertools.accumulate((len(part) for part in parts), initial=0)
            values = [torch.where(v < 0, v, v + n) for v, n in zip(values, before, strict=False)]
        joined[name] = None if values[0] is None else torch.cat(values)
    return Batch(**joined)


def write(
    run_dir: Path,
    config: Config,
    step: int,
    report: dict[str, Any],
    batch: Batch,
    weights: dict[str, Tensor] | None,
) -> Path:
    """Write the box of a skipped step, with `weights` if given; raises OSError."""
    folder = box_of(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        files.write_json(folder / "config.json", to_dict(config))
        save_tensors(folder / WEIGHTS, weights)
        boxes = sorted(folder.parent.glob(f"step-*/{WEIGHTS}"))
        for old in boxes[: max(len(boxes) - config.guard.replay_boxes, 0)]:
            old.unlink()
    samples = zip(batch.ids, batch.keys.tolist(), batch.epochs.tolist(), strict=True)
    facts = {
        "step": step,
        "samples": [{"id": i, "noise_key": key, "epoch": epoch} for i, key, epoch in samples],
    }
    torch.save(vars(batch) | {"ids": list(batch.ids)}, folder / "batch.pt")
    files.write_json(folder / "report.json", report | facts)
    return folder


@dataclass(frozen=True)
class Played:
    """The result of one sample of a replayed step, alone."""

    id: str
    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether the sample can be trained on."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def find_box(run_dir: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """The box of a step and its report; RunError names the steps that can be replayed."""
    box = box_of(run_dir, step)
    places = (box.parent, run_dir / _OLD_FOLDER)
    paths = {p.parent.name: p.parent for place in places for p in place.glob(f"step-*/{WEIGHTS}")}
    folder = paths.get(box.name)
    if folder is None:
        known = ", ".join(str(int(name.removeprefix("step-"))) for name in sorted(paths))
        raise RunError(
            f"step {step} has no replay box with weights in {box.parent}; there are: "
            f"{known or 'none'}"
        )
    try:
        return folder, files.load_json(folder / "report.json")
    except (FileNotFoundError, files.DamagedFileError) as error:
        raise RunError(f"step {step} cannot be replayed: {error}") from None


def replay(folder: Path, make_loss: Callable[[Config], nn.Module]) -> tuple[float, list[Played]]:
    """The loss of a step with its initial weights, then loss and gradient of each sample alone.

    Runs in one process, for any number of ranks of the run, and in the run's precision. `folder` is
    a replay box with weights; `make_loss` builds the module that was trained.
    """
    config = from_dict(Config, files.load_json(folder / "config.json"))
    saved = torch.load(folder / "batch.pt", weights_only=True)
    saved = {_OLD_NAMES.get(name, name): value for name, value in saved.items()}
    batch = Batch(**(saved | {"ids": tuple(saved["ids"])}))
    step = int(folder.name.removeprefix("step-"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = resolve(config.train.precision, device.type)
    module = make_loss(config).to(device)
    module.load_state_dict(load_file(folder / WEIGHTS))
    buffers = [b.clone() for b in module.buffers()]

    def play(part: Batch, gradient: bool) -> tuple[float, float]:
        for buffer, value in zip(module.buffers(), buffers, strict=True):
            buffer.data.copy_(value)
        module.zero_grad()
        with torch.set_grad_enabled(gradient), autocast(kind, device.type):
            loss = module(part, step).total
        if not gradient:
            return float(loss.detach()), 0.0
        loss.backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        return float(loss.detach()), float(torch.nn.utils.get_total_norm(grads))

    whole, _ = play(batch, gradient=False)
    return whole, [
        Played(batch.ids[i], *play(_one(batch, i), gradient=True)) for i in range(len(batch))
    ]


def _one(batch: Batch, i: int) -> Batch:
    """Sample i alone; a text from a packed row gets its own row."""
    alone: dict[str, Any] = {"ids": (batch.ids[i],), "average_over": 0}
    of_sample = _TENSORS
    if batch.text_of is not None:
        is_part = batch.text_of == i
        row = is_part.any(1)
        length = int(is_part.sum())
        tokens = torch.full_like(batch.tokens[row], PAD)
        prompt = torch.zeros_like(batch.prompt[row])
        tokens[0, :length], prompt[0, :length] = batch.tokens[is_part], batch.prompt[is_part]
        alone |= {"tokens": tokens, "prompt": prompt, "text_of": None}
        of_sample = ("keys", "epochs", "class_ids")
    for name in of_sample:
        tensor = getattr(batch, name)
        alone[name] = None if tensor is None else tensor[i : i + 1]
    return replace(batch, **alone)


def blame(played: list[Played]) -> list[tuple[Played, float]]:
    """Samples, the most conspicuous first: those that are not finite, then by gradient norm.

    Each comes with its gradient norm as a multiple of the median.
    """
    finite = [p.norm for p in played if p.finite]
    median = statistics.median(finite) if finite else math.nan
    ranked = [(p, p.norm / median if p.finite and median else math.inf) for p in played]
    return sorted(ranked, key=lambda row: (row[0].finite, -row[1]))


def describe(report: dict[str, Any], whole: float, played: list[Played]) -> str:
    """The result of a replay, as text."""
    ranked = blame(played)
    lines = [
        f"step {report['step']} was skipped: {report['reason']}",
        f"loss of the global batch: {report['loss']:.6g} then, {whole:.6g} now",
        f"{'sample, alone':40}{'loss':>12}{'gradient norm':>15}{'of the median':>15}",
    ]
    lines += [f"{p.id:40}{p.loss:12.5g}{p.norm:15.5g}{share:14.1f}x" for p, share in ranked[:SHOWN]]
    first, share = ranked[0]
    if not first.finite:
        names = ", ".join(p.id for p, _ in ranked if not p.finite)
        lines.append(f"not finite alone: {names}")
    elif share > 5:
        lines.append(f"sample {first.id} is to blame: its gradient is {share:.0f} times the median")
    else:
        lines.append(
            "no single sample stands out: suspect the weights or the learning rate, not the data"
        )
    return "\n".join(lines)
