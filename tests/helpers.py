"""A small real objective, an in-memory loader, and functions that start ranks in subprocesses."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.checkpoint.checkpoints import Checkpoints, Record
from mdm.config import Config, DataConfig, ModelConfig, TrainConfig
from mdm.data.batch import Batch, sample_keys
from mdm.loss import LossTerms
from mdm.utils.ranks import World

ROOT = Path(__file__).resolve().parents[1]
LENGTH, VOCAB, LATENTS, CHANNELS = 12, 64, 4, 16


def small_config(run_dir: Path, global_batch: int = 8, **train: Any) -> Config:
    settings = {
        "steps": 12,
        "lr": 1e-2,
        "warmup": 3,
        "decay": "cosine",
        "weight_decay": 0.1,
        "checkpoint_every": 6,
        "log_every": 1,
        "snapshots": 2,
        "threads": 1,
        "deepspeed": str(ROOT / "deepspeed_configs" / "cpu.json"),
    }
    return Config(
        model=ModelConfig(d_model=32, n_layer=2, headdim=16, vocab_size=VOCAB, text_length=LENGTH),
        data=DataConfig(global_batch=global_batch, caption_length=LENGTH, dialogue_length=LENGTH),
        train=TrainConfig(**(settings | train)),
        seed=1,
        run_dir=str(run_dir),
    )


class Mixer(nn.Module):
    """A gated block with the fp32 parameters of a Mamba-2 mixer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.in_proj = nn.Linear(width, 2 * width + 4, bias=False)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, 5.0)))
        self.D = nn.Parameter(torch.ones(4))
        self.dt_bias = nn.Parameter(torch.full((4,), -2.0))
        self.out_proj = nn.Linear(width, width, bias=False)
        for p in (self.A_log, self.D, self.dt_bias):
            p._no_weight_decay = True

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        value, gate, dt = self.in_proj(self.norm(x)).split([width, width, 4], -1)
        decay = torch.exp(-F.softplus(dt.float() + self.dt_bias) * self.A_log.exp()) + self.D
        mixed = value * decay.repeat_interleave(width // 4, -1)
        out: Tensor = x + self.out_proj(mixed * F.silu(gate))
        return out


class SmallLoss(nn.Module):
    """The interface of `mdm.loss.Loss`: two tasks, a running buffer, no hidden noise."""

    running_mean: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.model.d_model
        self.seed = config.seed
        self.embedding = nn.Embedding(config.model.vocab_size, width)
        self.image_in = nn.Linear(CHANNELS, width)
        self.blocks = nn.ModuleList(Mixer(width) for _ in range(config.model.n_layer))
        self.text_out = nn.Linear(width, config.model.vocab_size)
        self.image_out = nn.Linear(width, CHANNELS)
        self.register_buffer("running_mean", torch.zeros(CHANNELS))

    def forward(self, batch: Batch, step: int) -> LossTerms:
        zero = torch.zeros(())
        x = self.embedding(batch.tokens)
        if batch.latents is not None:
            self.running_mean.lerp_(batch.latents.mean((0, 1)), 0.1)
            x = torch.cat([x, self.image_in(batch.latents)], 1)
        else:  # every rank must run every module of its task; this adds zero
            x = x + 0.0 * self.image_in(torch.zeros(len(batch), 1, CHANNELS))
        for block in self.blocks:
            x = block(x)
        hidden = x[:, : batch.tokens.shape[1]]
        rec_txt = F.cross_entropy(
            self.text_out(hidden).float().flatten(0, 1), batch.tokens.flatten()
        )
        image = self.image_out(x[:, batch.tokens.shape[1] :])
        eps_img = zero if batch.latents is None else F.mse_loss(image.float(), batch.latents)
        return LossTerms(
            total=rec_txt + eps_img,
            rec_img=zero,
            rec_txt=rec_txt,
            kl=zero,
            eps_img=eps_img,
            se_img=zero,
            se_txt=zero,
            conditioning=torch.zeros(len(batch), dtype=torch.long),
            per_sample=torch.zeros(len(batch), 3),
        )


class MemoryLoader:
    """Batches made from a counter, equal on any number of ranks; every third is text-only.

    `poison_step` puts NaN into one sample of that step; `poison` scales the latents of samples from
    step `poison_from` on.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        poison_step: int = -1,
        poison: dict[str, float] | None = None,
    ) -> None:
        self.size, self.world = config.data.global_batch, world
        self.step, self.poison_step, self.poison = 0, poison_step, poison or {}
        self.poison_from = 0
        self.wait_seconds = 0.0
        self.order_digest = ""
        self.blocklist: frozenset[str] = frozenset()

    def sample_ids(self, step: int) -> list[str]:
        first = step * self.size
        ids = [f"sample-{n % 32}" for n in range(first, first + self.size)]
        allowed = [f"sample-{n}" for n in range(32) if f"sample-{n}" not in self.blocklist]
        return [allowed[i] if name in self.blocklist else name for i, name in enumerate(ids)]

    def block(self, ids) -> None:
        self.blocklist |= frozenset(ids)

    def __next__(self) -> Batch:
        first, every = self.step * self.size, self.sample_ids(self.step)
        numbers = range(first + self.world.rank, first + self.size, self.world.size)
        ids = tuple(every[self.world.rank :: self.world.size])
        keys = sample_keys(ids)
        tokens = (keys[:, None] % 7 + torch.arange(LENGTH)[None]) % VOCAB
        draws = [torch.Generator().manual_seed(n) for n in numbers]
        latents = torch.stack([torch.randn(LATENTS, CHANNELS, generator=g) for g in draws])
        if self.step == self.poison_step and self.world.rank == self.world.size - 1:
            latents[0, 0, 0] = torch.nan
        for i, name in enumerate(ids if self.step >= self.poison_from else ()):
            latents[i] *= self.poison.get(name, 1.0)
        text_only = self.step % 3 == 2
        self.step += 1
        self.order_digest = hashlib.sha256(f"{self.order_digest}{every}".encode()).hexdigest()
        return Batch(
            ids=ids,
            keys=keys,
            epochs=torch.zeros_like(keys),
            class_ids=torch.full_like(keys, -1),
            tokens=tokens,
            prompt=torch.zeros_like(tokens, dtype=torch.bool),
            latents=None if text_only else latents,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "order_digest": self.order_digest,
            "quarantined": sorted(self.blocklist),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.order_digest = state["step"], state["order_digest"]
        self.blocklist = frozenset(state["quarantined"])


def newest_valid(uri: str | Path) -> tuple[Record | None, list[tuple[str, str]]]:
    """The newest checkpoint whose every byte is intact, and why newer ones are skipped."""
    checkpoints = Checkpoints.at(str(uri))
    records, skipped = checkpoints.newest_first()
    for record in records:
        reason = checkpoints.why_invalid(record.name)
        if not reason:
            return record, [(name, why) for name, why in skipped if name > record.name]
        skipped.append((record.name, reason))
    return None, skipped


def start_ranks_of(script: Path, ranks: int, *args: str) -> subprocess.Popen[str]:
    """Start `script` on `ranks` processes, in a process group of their own, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script), *args]
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_ranks(script: Path, ranks: int, *args: str, timeout: float = 900) -> tuple[int, str]:
    """Run `script` on `ranks` processes to its end; returns exit code and output."""
    process = start_ranks_of(script, ranks, *args)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output
