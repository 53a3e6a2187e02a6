"""A rank of `engine_overhead`: our step, a bare DeepSpeed step and the model alone, in turn."""

import dataclasses
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist

from mdm.checkpoint.checkpoints import Checkpoints, Keep
from mdm.checkpoint.state import TrainState
from mdm.config import Config
from mdm.data.batch import Batch, sample_keys
from mdm.loss import Loss
from mdm.model.decoder import Trunk
from mdm.presets import PRESETS
from mdm.train.deepspeed_config import load_deepspeed_config
from mdm.train.ema import EMA
from mdm.train.engine import Engine, decay_groups, start_ranks, stop_ranks
from mdm.train.guard import Guard
from mdm.train.heartbeat import Heartbeat
from mdm.train.loop import take_step
from mdm.train.metrics import Clock, Reporter, Window
from mdm.train.profiling import Profile
from mdm.train.run import Run
from mdm.train.saver import Saver
from mdm.train.throughput import Ranks, Throughput
from mdm.train.writer import Writer
from mdm.utils.precision import autocast, resolve
from mdm.utils.ranks import World, from_main, gather_to_all
from mdm.utils.tracking import NullTracker

# A round has every kind of the demo's steps: with an image, a dialogue, self-conditioned.
STEPS, ROUNDS, WARM = 10, 8, 2


class RepeatedBatches:
    """Returns the same `STEPS` batches again and again: images with captions, and a dialogue."""

    def __init__(self, config: Config, world: World) -> None:
        self.batches = [random_batch(config, world, i == STEPS // 2) for i in range(STEPS)]
        self.blocklist: frozenset[str] = frozenset()
        self.wait_seconds, self.order_digest, self.step = 0.0, "", 0

    def __next__(self) -> Batch:
        self.step += 1
        return self.batches[(self.step - 1) % STEPS]


def random_batch(config: Config, world: World, is_dialogue: bool) -> Batch:
    """This rank's share of a batch of the demo."""
    b, data = config.data.global_batch // world.size, config.data
    n = config.model.image_height * config.model.image_width
    m = data.dialogue_length if is_dialogue else data.caption_length
    draw = torch.Generator().manual_seed(world.rank)
    ids = tuple(f"s:{world.rank * b + i}" for i in range(b))
    return Batch(
        ids=ids,
        keys=sample_keys(ids),
        epochs=torch.zeros(b, dtype=torch.int64),
        class_ids=torch.zeros(b, dtype=torch.int64),
        tokens=torch.randint(0, config.model.vocab_size, (b, m), generator=draw),
        prompt=torch.zeros(b, m, dtype=torch.bool),
        latents=None if is_dialogue else torch.randn(b, n, config.model.latent_dim, generator=draw),
    )


def demo_config(run_dir: str) -> Config:
    """The demo's, without checkpoints."""
    preset = PRESETS["demo"]
    train = dataclasses.replace(preset.train, threads=1, checkpoint_every=10**9)
    return dataclasses.replace(preset, train=train, run_dir=run_dir)


def make_run(config: Config, world: World) -> Run:
    """What our step needs, with batches in memory."""
    engine = Engine(lambda: Loss(config), config, world, (Trunk,))
    ema = EMA(engine.shards.partitions(), config.train.ema)
    heartbeat = Heartbeat(Path(config.run_dir), world.rank, world.size, 600.0)
    return Run(
        config=config,
        world=world,
        engine=engine,
        ema=ema,
        loader=cast(Any, RepeatedBatches(config, world)),
        state=TrainState(),
        tracker=NullTracker(),
        reporter=Reporter(config.run_dir, 10**6, world),
        clock=Clock({}, heartbeat.enter),
        window=Window(world),
        saver=Saver(Checkpoints.at(config.run_dir), engine, ema, world, Keep.of(config)),
        guard=Guard(config.guard),
        heartbeat=heartbeat,
        work=Throughput(config, world),
        ranks=Ranks(engine.device),
        profile=Profile(range(0), Path(config.run_dir), world),
        writer=Writer([]),
    )


def main() -> None:
    world = start_ranks(1)
    own = tempfile.mkdtemp(prefix="mdm-bench-") if world.is_main else ""
    config = demo_config(from_main(own))
    run = make_run(config, world)
    batches = cast(Any, run.loader).batches
    bare, alone = bare_engine(config, world), model_alone(config, world)

    def bare_step(i: int) -> None:
        bare.backward(bare(batches[i % STEPS], i).total)
        bare.step()

    contestants: dict[str, Callable[[int], object]] = {
        "ours": lambda i: take_step(run),
        "bare": bare_step,
        "alone": lambda i: alone(batches[i % STEPS], i),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(STEPS * ROUNDS):
        if i == STEPS * WARM:
            run.clock = Clock({}, run.heartbeat.enter)
        for name, step in contestants.items():
            dist.barrier()
            began = time.perf_counter()
            step(i)
            times[name].append(time.perf_counter() - began)
    run.clock.tick("other")
    run.heartbeat.close()
    if run.guard.history.skipped:
        raise RuntimeError("the guard skipped steps: these are not times of whole steps")
    every = gather_to_all({name: of_steps(values) for name, values in times.items()})
    figures: dict[str, Any] = {
        name: statistics.fmean(of_rank[name] for of_rank in every) for name in times
    }
    steps = STEPS * (ROUNDS - WARM)
    figures["parts"] = {
        k: 1e3 * run.clock.seconds[k] / steps for k in ("ema", "exchange", "data", "optimizer")
    }
    figures["parameters"] = sum(cast(Any, p).ds_numel for p in run.engine.module.parameters())
    figures["batch"] = config.data.global_batch
    if world.is_main:
        shutil.rmtree(config.run_dir, ignore_errors=True)
        Path(sys.argv[1]).write_text(json.dumps(figures))


def of_steps(seconds: list[float]) -> float:
    """Milliseconds of a step: the median over rounds of the mean of their steps."""
    rounds = torch.tensor(seconds).view(ROUNDS, STEPS)[WARM:]
    return 1e3 * float(rounds.mean(1).median())


def model_alone(config: Config, world: World) -> Callable[[Batch, int], None]:
    """The step without an engine: forward, backward, AdamW on this rank's share; no collective."""
    torch.manual_seed(config.seed)
    module = Loss(config)
    shared = sum(p.numel() for p in module.parameters())
    share = torch.nn.Parameter(torch.zeros(math.ceil(shared / world.size)))
    share.grad = torch.zeros_like(share)
    optimizer = torch.optim.AdamW([share], fused=True, lr=config.train.lr)
    precision = resolve(config.train.precision)

    def step(batch: Batch, i: int) -> None:
        with patch("torch.distributed.is_initialized", lambda: False):
            with autocast(precision):
                loss = module(batch, i).total
            loss.backward()
        optimizer.step()
        module.zero_grad(set_to_none=True)

    return step


def bare_engine(config: Config, world: World) -> Any:
    """DeepSpeed around the same module, as in its documentation."""
    torch.manual_seed(config.seed)
    module = Loss(config)
    deepspeed.utils.set_z3_leaf_modules(module, [Trunk])
    groups = decay_groups(module, config.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True, lr=config.train.lr)
    values = load_deepspeed_config(config, world.size)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=values)
    return engine


if __name__ == "__main__":
    main()
    stop_ranks()
