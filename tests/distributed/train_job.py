"""A training job of the small objective: like `pipelines/pretrain.py`, but without a data set.

The second argument is a JSON object of options, which also inject faults.
"""

import dataclasses
import functools
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from mdm.checkpoint.checkpoints import Checkpoints, uri_of
from mdm.checkpoint.snapshot import Snapshot
from mdm.checkpoint.state import RunError
from mdm.config import Config, GuardConfig
from mdm.loss import Loss
from mdm.train import heartbeat
from mdm.train.engine import start_ranks, stop_ranks
from mdm.train.loop import train
from mdm.train.run import Draw
from mdm.train.saver import Saver
from mdm.utils import exit_codes
from mdm.utils.ranks import World
from tests.helpers import MemoryLoader, Mixer, SmallLoss, small_config


class FaultyLoader(MemoryLoader):
    """Injects faults before it returns the batch of a given step."""

    signal_step, signal_number = -1, signal.SIGKILL
    small_files: ClassVar[dict[str, int]] = {}  # step -> limit on file sizes from then on, in bytes
    kill: ClassVar[dict[str, int]] = {}  # step -> process to kill once a checkpoint is committed
    wait_for: ClassVar[dict[str, str]] = {}  # step -> file to wait for before that step
    checkpoints: Checkpoints
    explode_from = sys.maxsize  # from this step on, all latents are far too large
    once = ""  # a marker file: if given, only the first attempt sends the signal

    def _first(self) -> bool:
        if not self.once:
            return True
        try:
            Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    pace = 0.0  # least seconds for each batch

    def __next__(self):
        time.sleep(self.pace)
        if self.step == self.signal_step and self._first():
            os.kill(os.getpid(), self.signal_number)
        while not Path(self.wait_for.get(str(self.step), "/")).exists():
            time.sleep(0.1)
        if str(self.step) in self.kill:
            while not self.checkpoints.newest_first()[0]:
                time.sleep(0.1)
            os.kill(self.kill[str(self.step)], signal.SIGKILL)
        if str(self.step) in self.small_files:
            limit = self.small_files[str(self.step)]
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        exploding = self.explode_from <= self.step
        batch = super().__next__()
        if exploding and batch.latents is not None:
            batch = dataclasses.replace(batch, latents=batch.latents * 1e4)
        return batch


def die_while_writing(step: int) -> None:
    """SIGKILL in the middle of a background save, after two objects were written."""
    write = Snapshot.write

    def torn(self, store, folder, rank):
        put, written = store.put, []

        def put_or_die(key, data, **options):
            if folder.startswith(f"step-{step:08d}") and len(written) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(key)
            return put(key, data, **options)

        store.put = put_or_die
        return write(self, store, folder, rank)

    Snapshot.write = torn


def slow_save(seconds: float) -> None:
    """Slow down every write to the store, so that a signal can hit a save."""
    write = Snapshot.write

    def slow(self, store, folder, rank):
        put = store.put

        def slow_put(key, data, **options):
            time.sleep(seconds)
            return put(key, data, **options)

        store.put = slow_put
        try:
            return write(self, store, folder, rank)
        finally:
            store.put = put

    Snapshot.write = slow


def die_before_marker(step: int) -> None:
    """SIGKILL after everything is written, before the commit."""
    commit = Checkpoints.commit

    def torn(self, name, manifest):
        if name.startswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, name, manifest)

    Checkpoints.commit = torn


def save_restored_state_to(uri: str) -> None:
    """After restoring and before any step, save the state of the ranks to `uri` as well."""
    restore = Saver.restore

    def restore_and_save(self, candidates):
        record, passed = restore(self, candidates)
        if record is not None:
            own_checkpoints, self.checkpoints = self.checkpoints, Checkpoints.at(uri)
            self.save(record.state, record.manifest["loader"])
            self.wait()
            self.checkpoints = own_checkpoints
        return record, passed

    Saver.restore = restore_and_save


def configured(run_dir: Path, options: dict[str, Any]) -> tuple[Config, type[nn.Module]]:
    """The run's configuration and objective: the small ones, changed by `options`."""
    config = small_config(run_dir, options.get("global_batch", 8), **options.get("train", {}))
    objective: type[nn.Module] = SmallLoss
    if options.get("real"):
        grid = dataclasses.replace(config.model, image_height=2, image_width=2)
        config, objective = dataclasses.replace(config, model=grid), Loss
    if "guard" in options:
        config = dataclasses.replace(config, guard=GuardConfig(**options["guard"]))
    if "images" in options:  # tokenizer, autoencoder, vocab_size
        inputs = dict(options["images"])
        model = dataclasses.replace(config.model, vocab_size=inputs.pop("vocab_size"))
        config = dataclasses.replace(config, model=model, **inputs)
    return config, objective


def drawing(options: dict[str, Any]) -> Draw | None:
    """The function that generates images with each snapshot; None without the option `draw`."""
    if not options.get("draw"):
        return None
    from mdm.report.drawing import draw_samples

    return functools.partial(draw_samples, n=2)


def main() -> int:
    run_dir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    config, objective = configured(run_dir, options)
    world = start_ranks(config.train.threads)

    def make_loader(config, world: World) -> MemoryLoader:
        loader = FaultyLoader(config, world, options.get("poison_step", -1), options.get("poison"))
        loader.once = options.get("once", "")
        loader.poison_from = options.get("poison_from", 0)
        loader.wait_for = options.get("wait_for", {})
        loader.pace = options.get("pace", 0.0)
        loader.explode_from = options.get("explode_from", sys.maxsize)
        if world.rank in options.get("signal_ranks", range(world.size)):
            loader.signal_step = options.get("signal_step", -1)
            loader.small_files = options.get("small_files", {})
            loader.kill = options.get("kill", {})
        loader.checkpoints = Checkpoints.at(uri_of(config))
        loader.signal_number = options.get("signal", signal.SIGKILL)
        return loader

    for fault in (save_restored_state_to, die_while_writing, die_before_marker, slow_save):
        if argument := options.get(fault.__name__):
            fault(argument)
    while not Path(options.get("begin_when", "/")).exists():
        time.sleep(0.02)
    try:
        code = train(
            config,
            world,
            objective,
            make_loader,
            resume=options.get("resume", "auto"),
            leaf_classes=(Mixer,),
            track=options.get("track", False),
            draw=drawing(options),
        )
        heartbeat.report_end(code)
        return code
    except RunError as error:
        heartbeat.report_end(error.code, str(error))
        if world.is_main:
            print(error, file=sys.stderr)  # noqa: T201
        return error.code
    except Exception as error:
        heartbeat.report_end(exit_codes.GAVE_UP, f"{type(error).__name__}: {error}")
        raise
    finally:
        stop_ranks()


if __name__ == "__main__":
    sys.exit(main())
