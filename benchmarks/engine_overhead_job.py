"""A rank of `engine_overhead`: takes our step and a bare DeepSpeed step in turn."""

import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist

from mdm.checkpoint.checkpoints import Checkpoints, Keep
from mdm.checkpoint.state import TrainState
from mdm.config import Config, GuardConfig
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
from mdm.utils.ranks import World, from_main
from mdm.utils.tracking import NullTracker

ROUNDS, WARM = 40, 6


class RepeatedBatch:
    """Returns the same batch again and again."""

    def __init__(self, config: Config, world: World) -> None:
        b, m = config.data.global_batch // world.size, config.data.caption_length
        n = config.model.image_height * config.model.image_width
        draw = torch.Generator().manual_seed(world.rank)
        ids = tuple(f"s:{world.rank * b + i}" for i in range(b))
        self.batch = Batch(
            ids=ids,
            keys=sample_keys(ids),
            epochs=torch.zeros(b, dtype=torch.int64),
            class_ids=torch.zeros(b, dtype=torch.int64),
            tokens=torch.randint(0, config.model.vocab_size, (b, m), generator=draw),
            prompt=torch.zeros(b, m, dtype=torch.bool),
            latents=torch.randn(b, n, config.model.latent_dim, generator=draw),
        )
        self.blocklist: frozenset[str] = frozenset()
        self.wait_seconds, self.order_digest = 0.0, ""

    def __next__(self) -> Batch:
        return self.batch


def main() -> None:
    preset = PRESETS["demo"]
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, kernel="torch"),
        train=dataclasses.replace(preset.train, threads=1, checkpoint_every=10**9),
        guard=GuardConfig(),
        run_dir=tempfile.mkdtemp(prefix="mdm-bench-"),
    )
    world = start_ranks(1)
    own_folder = Path(config.run_dir)
    config = dataclasses.replace(config, run_dir=from_main(config.run_dir))
    if not world.is_main:
        own_folder.rmdir()
    engine = Engine(lambda: Loss(config), config, world, (Trunk,))
    ema = EMA(engine.shards.partitions(), config.train.ema)
    loader = RepeatedBatch(config, world)
    heartbeat = Heartbeat(Path(config.run_dir), world.rank, world.size, 600.0)
    reporter = Reporter(config.run_dir, 10**6, world)
    saver = Saver(Checkpoints.at(config.run_dir), engine, ema, world, Keep.of(config))
    run = Run(
        config=config,
        world=world,
        engine=engine,
        ema=ema,
        loader=cast(Any, loader),
        state=TrainState(),
        tracker=NullTracker(),
        reporter=reporter,
        clock=Clock({}, heartbeat.enter),
        window=Window(world),
        saver=saver,
        guard=Guard(config.guard),
        heartbeat=heartbeat,
        work=Throughput(config, world),
        ranks=Ranks(engine.device),
        profile=Profile(range(0), Path(config.run_dir), world),
        writer=Writer([]),
    )
    bare = bare_engine(config, world)
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for i in range(ROUNDS):
        if i == WARM:
            run.clock = Clock({}, heartbeat.enter)
        dist.barrier()
        began = time.perf_counter()
        take_step(run)
        times["ours"].append(time.perf_counter() - began)
        dist.barrier()
        began = time.perf_counter()
        loss = bare(loader.batch, i).total
        bare.backward(loss)
        bare.step()
        times["bare"].append(time.perf_counter() - began)
    run.clock.tick("other")
    heartbeat.close()
    figures: dict[str, Any] = {
        name: 1e3 * statistics.median(values[WARM:]) for name, values in times.items()
    }
    steps = ROUNDS - WARM
    figures["parts"] = {
        k: 1e3 * run.clock.seconds[k] / steps for k in ("ema", "exchange", "data", "optimizer")
    }
    figures["parameters"] = sum(cast(Any, p).ds_numel for p in engine.module.parameters())
    figures["batch"] = config.data.global_batch
    if world.is_main:
        shutil.rmtree(config.run_dir, ignore_errors=True)
        Path(sys.argv[1]).write_text(json.dumps(figures))


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
