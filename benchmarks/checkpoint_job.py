"""A rank of the benchmark `checkpoint`. Arguments: `save` or `resume`, scratch folder, URI."""

import dataclasses
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch.distributed

from mdm.checkpoint.checkpoints import Checkpoints, Keep
from mdm.checkpoint.state import TrainState
from mdm.config import Config
from mdm.train.ema import EMA
from mdm.train.engine import Engine, start_ranks, stop_ranks
from mdm.train.saver import Saver
from mdm.utils.ranks import gather_to_all
from mdm.utils.saved_config import to_dict
from tests.helpers import MemoryLoader, Mixer, SmallLoss, small_config

ROUNDS = 7


def sized(folder: Path) -> Config:
    config = small_config(folder)
    model = dataclasses.replace(config.model, d_model=512, n_layer=12)
    return dataclasses.replace(config, model=model)


def main() -> None:
    mode, folder, uri = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    config, world = sized(folder), start_ranks(1)
    engine = Engine(lambda: SmallLoss(config), config, world, (Mixer,))
    ema, loader = EMA(engine.shards.partitions(), 0.99), MemoryLoader(config, world)
    saver = Saver(Checkpoints.at(uri), engine, ema, world, Keep(1))
    state = TrainState(world_size=world.size, config=to_dict(config))
    times: dict[str, list[float]] = {
        n: [] for n in ("step", "ema", "blocked", "durable", "deepspeed")
    }

    def step() -> None:
        began = time.perf_counter()
        engine.backward(engine.forward(next(loader), state.step).total)
        engine.step(1e-3)
        ema_began = time.perf_counter()
        ema.update(engine.shards.partitions())
        times["ema"].append(time.perf_counter() - ema_began)
        times["step"].append(time.perf_counter() - began)
        state.step += 1

    figures: dict[str, float] = {}
    if mode == "resume":
        records = saver.checkpoints.newest_first()[0]
        assert saver.restore(records)[0] is not None
        step()
        figures["first_step"] = time.time() - psutil.Process().create_time()
        figures["restore"] = saver.figures["restore_seconds"]
    else:
        for number in range(ROUNDS):
            step()
            torch.distributed.barrier()
            saver.save(state, loader.state_dict())
            saver.wait()
            assert not saver.messages()
            times["blocked"].append(saver.figures["save_blocked_seconds"])
            times["durable"].append(saver.figures["save_durable_seconds"])
            torch.distributed.barrier()
            began = time.perf_counter()
            engine._engine.save_checkpoint(str(folder / "deepspeed"), tag=str(number))
            times["deepspeed"].append(time.perf_counter() - began)
            torch.distributed.barrier()
            if world.is_main:
                shutil.rmtree(folder / "deepspeed")
        # Leave out the first round, which touches memory and files for the first time.
        figures = {n: statistics.median(values[1:]) for n, values in times.items()}
        figures |= {n: 1e3 * figures[n] for n in ("step", "ema", "blocked", "deepspeed")}
    of_ranks = gather_to_all(figures)
    if world.is_main:
        slowest = {n: max(rank[n] for rank in of_ranks) for n in figures}
        print(json.dumps(slowest | {"mebibytes": world.size * saver.nbytes / 2**20}))
    saver.wait()


if __name__ == "__main__":
    main()
    stop_ranks()
