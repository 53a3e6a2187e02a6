"""The parts of a running job, which the loop passes to the functions that it calls."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.checkpoint.state import TrainState
from mdm.config import Config
from mdm.data.loader import Loader
from mdm.train.ema import EMA
from mdm.train.engine import Engine
from mdm.train.guard import Guard
from mdm.train.heartbeat import Heartbeat
from mdm.train.metrics import Clock, Reporter, Window
from mdm.train.profiling import Profile
from mdm.train.saver import Saver
from mdm.train.throughput import Ranks, Throughput
from mdm.train.writer import Writer
from mdm.utils.ranks import World
from mdm.utils.tracking import MlflowTracker, NullTracker

# Draws images with the weights of an export (the first path) into a PNG (the second). Returns
# what they show, as plain JSON values.
Draw = Callable[[Path, Path], dict[str, Any]]


@dataclass
class Run:
    """The parts of a running job."""

    config: Config
    world: World
    engine: Engine
    ema: EMA
    loader: Loader
    state: TrainState
    tracker: MlflowTracker | NullTracker
    reporter: Reporter
    clock: Clock
    window: Window
    saver: Saver
    guard: Guard
    heartbeat: Heartbeat
    work: Throughput
    ranks: Ranks
    profile: Profile
    writer: Writer
    draw: Draw | None = None
    tokenizer: bytes = b""  # content of the `.model` file, for exports
    linked_step: int = -1  # of the newest checkpoint that was logged

    @property
    def dir(self) -> Path:
        """The folder of checkpoints, exports and logs."""
        return Path(self.config.run_dir)
