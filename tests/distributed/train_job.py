"""A training job of the small objective: what `pipelines/pretrain.py` does, without a data set."""

import json
import os
import signal
import sys
from pathlib import Path

from mdm.config import fail
from mdm.dist import World
from mdm.train import checkpoint
from mdm.train.engine import start_ranks, stop_ranks
from mdm.train.loop import train
from mdm.train.state import RunError
from tests.helpers import MemoryLoader, Mixer, SmallObjective, small_config


class FatalLoader(MemoryLoader):
    """Raises a signal in this process before it hands out a given step's batch."""

    signal_step, signal_number = -1, signal.SIGKILL

    def __next__(self):
        if self.step == self.signal_step:
            os.kill(os.getpid(), self.signal_number)
        return super().__next__()


def main() -> int:
    run_dir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = small_config(run_dir, **options.get("train", {}))
    world = start_ranks(config.train.threads)

    def make_loader(config, world: World) -> MemoryLoader:
        loader = FatalLoader(config, world, options.get("poison_step", -1))
        if world.rank in options.get("signal_ranks", range(world.size)):
            loader.signal_step = options.get("signal_step", -1)
        loader.signal_number = options.get("signal", signal.SIGKILL)
        return loader

    if options.get("tear_save"):
        commit = checkpoint._commit

        def torn(work, final, world):
            if final.name == options["tear_save"]:
                os.kill(os.getpid(), signal.SIGKILL)
            commit(work, final, world)

        checkpoint._commit = torn
    try:
        return train(
            config,
            world,
            SmallObjective,
            make_loader,
            resume=options.get("resume", "auto"),
            leaf_classes=(Mixer,),
            track=options.get("track", False),
        )
    except RunError as error:
        if world.is_main:
            fail(str(error))
        return 2
    finally:
        stop_ranks()


if __name__ == "__main__":
    sys.exit(main())
