"""Trains a baseline of `make learn-text` on the rows that the diffusion sees, one process.

    python examples/text/train.py --preset learn_text --kind masked

AdamW with the project's learning rate, batch, clipping, precision and averaged weights. An
interrupted run continues from its last checkpoint and gives the weights of an uninterrupted one.
"""

from mdm.launch.job import job

import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.text.baselines import Autoregressive, Masked, parameters
from examples.text.data import Rows
from mdm.config import Config, config_of, doc
from mdm.model.mdm import MDM
from mdm.presets import PRESETS
from mdm.train.loop import learning_rate
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import check_fields, one_of
from mdm.utils.files import append_line, read_json, write_bytes, write_json
from mdm.utils.precision import autocast, resolve

KINDS = ("autoregressive", "masked")
CHECKPOINT, WEIGHTS, REPORT, METRICS = "last.pt", "weights.pt", "done.json", "metrics.jsonl"


@dataclass(frozen=True)
class Flags(Config):
    """The configuration of the diffusion that a baseline is compared with, and which baseline."""

    preset: str = doc("", f"required, one of {', '.join(PRESETS)}")
    kind: str = doc("masked", "the baseline", one_of(*KINDS))
    rows: str = doc("runs/learn-text/data/train.npz", "the training rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)


def text_parameters(config: Config) -> int:
    """Parameters of the diffusion model that texts use."""
    with torch.device("meta"):
        named = MDM(config.model).named_parameters()
    return sum(p.numel() for name, p in named if not _is_of_images(name))


def make(kind: str, config: Config) -> Autoregressive | Masked:
    """A baseline as large as the diffusion model of `config`, with weights of its seed."""
    torch.manual_seed(config.seed)
    size = text_parameters(config)
    if kind == "masked":
        return Masked.of_size(config.model, size)
    return Autoregressive.of_size(config.model, size)


def batch_indices(rows: int, batch: int, step: int, seed: int) -> Tensor:
    """The rows of a step, i64 [batch]: each once an epoch."""
    first, indices = step * batch, []
    for epoch in range(first // rows, (first + batch - 1) // rows + 1):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))
        start, stop = first - epoch * rows, first + batch - epoch * rows
        indices.append(order[max(start, 0) : stop])
    return torch.cat(indices)


class Run:
    """A baseline in training: model, averaged weights and optimizer."""

    def __init__(self, model: Autoregressive | Masked, config: Config, folder: Path) -> None:
        self.model, self.config, self.folder = model, config, folder
        self.step, self.seconds = 0, 0.0
        self.precision = resolve(config.train.precision)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
        )
        self.averages = [p.detach().clone() for p in model.parameters()]
        if (last := folder / CHECKPOINT).exists():
            self._restore(torch.load(last))

    def train(self, tokens: Tensor) -> None:
        """Take the steps that are left, on rows i64 [R, M]."""
        train = self.config.train
        began = time.monotonic() - self.seconds
        steps = range(self.step, train.steps)
        for step in (shown := tqdm(steps, initial=self.step, total=train.steps, desc="steps")):
            loss = self._take_step(tokens, step)
            self.step, self.seconds = step + 1, time.monotonic() - began
            if self.step % train.log_every == 0:
                seen = self.step * self.config.data.global_batch
                append_line(self.folder / METRICS, {"samples_seen": float(seen), "loss": loss})
                shown.set_postfix_str(f"{loss:.3f} nats a token")
            if self.step % train.checkpoint_every == 0 or self.step == train.steps:
                self._save()

    def _take_step(self, tokens: Tensor, step: int) -> float:
        """One step; returns the loss in nats a token."""
        config, train = self.config, self.config.train
        index = batch_indices(len(tokens), config.data.global_batch, step, config.seed)
        generator = torch.Generator().manual_seed(config.seed << 32 | step)
        with autocast(self.precision):
            loss = self.model.nats(tokens[index], generator).mean() / tokens.shape[1]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        self.optimizer.step()
        decay = min(train.ema, (1 + step) / (10 + step))  # as `mdm.train.ema.EMA`
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, list(self.model.parameters()), 1 - decay)
        return float(loss.detach())

    def _save(self) -> None:
        buffer = io.BytesIO()
        state = {"step": self.step, "seconds": self.seconds, "averages": self.averages}
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | parts, buffer)
        write_bytes(self.folder / CHECKPOINT, buffer.getvalue())

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.averages = (
            state[name] for name in ("step", "seconds", "averages")
        )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def finish(self) -> dict[str, Any]:
        """Write the averaged weights, and return what `done.json` holds, written last."""
        with torch.no_grad():
            for parameter, average in zip(self.model.parameters(), self.averages, strict=True):
                parameter.copy_(average)
        buffer = io.BytesIO()
        torch.save(self.model.state_dict(), buffer)
        write_bytes(self.folder / WEIGHTS, buffer.getvalue())
        report = {"steps": self.step, "wall_seconds": self.seconds}
        report["parameters"] = parameters(self.model)
        write_json(self.folder / REPORT, report)
        return report


def run(kind: str, config: Config, rows: Path) -> dict[str, Any]:
    """Train a baseline in `config.run_dir`, or continue; returns the content of `done.json`."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if done := read_json(folder / REPORT, {"steps": int, "wall_seconds": float}):
        return done
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    tokens = torch.from_numpy(Rows.load(rows).tokens)
    job = Run(make(kind, config), config, folder)
    job.train(tokens)
    return job.finish()


def load(kind: str, config: Config, folder: Path) -> Autoregressive | Masked:
    """The baseline that `run` trained in `folder`."""
    model = make(kind, config)
    model.load_state_dict(torch.load(folder / WEIGHTS))
    return model.eval()


def _is_of_images(name: str) -> bool:
    return "image" in name or "summary" in name


@job("text_train", ValueError)
def main() -> None:
    """Run the job and print its size and time."""
    flags = parse_cli(Flags, description=__doc__ or "", presets=PRESETS)
    report = run(flags.kind, config_of(flags), Path(flags.rows))
    print(f"{flags.kind}: {report}")


if __name__ == "__main__":
    sys.exit(main())
