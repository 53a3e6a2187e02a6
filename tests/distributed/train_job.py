"""A training job of the small objective: what `pipelines/pretrain.py` does, without a data set."""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

from mdm.config import fail
from mdm.dist import World
from mdm.train.checkpoint import Checkpoints, uri_of
from mdm.train.engine import start_ranks, stop_ranks
from mdm.train.loop import train
from mdm.train.saver import Saver
from mdm.train.snapshot import Snapshot
from mdm.train.state import RunError
from tests.helpers import MemoryLoader, Mixer, SmallObjective, small_config


class FatalLoader(MemoryLoader):
    """Raises a signal in this process before it hands out a given step's batch."""

    signal_step, signal_number = -1, signal.SIGKILL
    small_files: ClassVar[dict[str, int]] = {}  # step -> largest file in bytes from then on
    kill: ClassVar[dict[str, int]] = {}  # step -> process to kill, once there is a checkpoint
    checkpoints: Checkpoints

    def __next__(self):
        if self.step == self.signal_step:
            os.kill(os.getpid(), self.signal_number)
        if str(self.step) in self.kill:
            while not self.checkpoints.newest_first()[0]:
                time.sleep(0.1)
            os.kill(self.kill[str(self.step)], signal.SIGKILL)
        if str(self.step) in self.small_files:
            limit = self.small_files[str(self.step)]
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return super().__next__()


def die_while_writing(step: int) -> None:
    """SIGKILL in the middle of a background save: some objects are in the store, others not."""
    write = Snapshot.write

    def torn(self, store, folder, rank):
        put, done = store.put, []

        def fatal(key, data, **options):
            if folder.startswith(f"step-{step:08d}") and len(done) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(key)
            return put(key, data, **options)

        store.put = fatal
        return write(self, store, folder, rank)

    Snapshot.write = torn


def die_before_marker(step: int) -> None:
    """SIGKILL when all is written but the commit."""
    commit = Checkpoints.commit

    def torn(self, name, manifest):
        if name.startswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, name, manifest)

    Checkpoints.commit = torn


def copy_what_was_restored(uri: str) -> None:
    """Save elsewhere what these ranks hold after they restored, before any step."""
    restore = Saver.restore

    def both(self, candidates):
        found, passed = restore(self, candidates)
        if found is not None:
            own, self.checkpoints = self.checkpoints, Checkpoints.at(uri)
            self.save(found.state, found.manifest["loader"])
            self.wait()
            self.checkpoints = own
        return found, passed

    Saver.restore = both


def main() -> int:
    run_dir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = small_config(run_dir, options.get("global_batch", 8), **options.get("train", {}))
    world = start_ranks(config.train.threads)

    def make_loader(config, world: World) -> MemoryLoader:
        loader = FatalLoader(config, world, options.get("poison_step", -1))
        if world.rank in options.get("signal_ranks", range(world.size)):
            loader.signal_step = options.get("signal_step", -1)
            loader.small_files = options.get("small_files", {})
            loader.kill = options.get("kill", {})
        loader.checkpoints = Checkpoints.at(uri_of(config))
        loader.signal_number = options.get("signal", signal.SIGKILL)
        return loader

    if options.get("copies"):
        copy_what_was_restored(options["copies"])
    if options.get("die_while_writing"):
        die_while_writing(options["die_while_writing"])
    if options.get("die_before_marker"):
        die_before_marker(options["die_before_marker"])
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
