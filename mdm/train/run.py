"""All that a running job holds: what the loop hands to what it calls."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mdm.checkpoint.state import TrainState
from mdm.config import Config
from mdm.data.batch import Batch
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

# Draws images with the weights of an export (the first path) into a PNG (the second) and returns
# what they show, as plain JSON values.
Draw = Callable[[Path, Path], dict[str, Any]]


class Loader(Protocol):
    """This rank's stream of batches, with a state that continues it exactly."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch handed out, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""

    def sample_ids(self, step: int) -> Sequence[str]:
        """The global sample ids of any step."""

    def block(self, ids: Iterable[str]) -> None:
        """From the next batch on, others take the places of these samples; all ranks call."""

    @property
    def blocklist(self) -> frozenset[str]:
        """The ids that are not shown any more; part of the state."""

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for data so far."""

    @property
    def order_digest(self) -> str:
        """Digest of the sample ids handed out so far."""


@dataclass
class Run:
    """All that a running job holds."""

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
    tokenizer: bytes = b""  # the `.model` file for exports, as it was when the run began
    linked_step: int = -1  # of the newest checkpoint that was told of

    @property
    def dir(self) -> Path:
        """Folder of checkpoints, exports and logs."""
        return Path(self.config.run_dir)
