"""When a step is not to be trusted: losses and gradient norms that are not finite, or spikes.

Each task has running means and deviations of its loss and of its gradient norm; only steps that
were applied enter them. Everything here is a function of numbers that all ranks share, so that all
decide alike, and its state is part of the checkpoint, so that a resumed run decides as an
undisturbed one does:

    a step in trouble    is skipped: weights, averages and buffers stay as they were
    more than `skips` of them within `window` steps
                         the run goes back to a checkpoint from before the first of them, and the
                         samples of the skipped steps and of the `suspects` before are blocked
    more than `rollbacks` of these without `window` good steps between
                         the run ends: it is not the data
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mdm.config import GuardConfig

# A deviation counts as at least this share of the mean: a loss that hardly moves has hardly any,
# and a gradient norm jumps by far more than a loss on a good day.
FLOOR = {"loss": 0.1, "norm": 0.5}


@dataclass
class Running:
    """Exponentially weighted mean and variance; a plain mean until `window` values were seen."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float, window: int) -> None:
        """One more accepted value."""
        self.count += 1
        share = 1.0 / min(self.count, window)
        change = value - self.mean
        self.mean += share * change
        self.variance = (1.0 - share) * (self.variance + share * change * change)

    def limit(self, sigma: float, floor: float) -> float:
        """The largest value that is no spike."""
        return self.mean + sigma * max(math.sqrt(self.variance), floor * abs(self.mean))


@dataclass
class History:
    """What the guard remembers, as the checkpoint keeps it."""

    running: dict[str, Running] = field(default_factory=dict)  # "loss/task", "norm/task"
    recent: list[int] = field(default_factory=list)  # skipped steps of the last `window`
    skipped: int = 0
    # Pairs: the step at which it was decided, and that of the checkpoint.
    rollbacks: list[list[int]] = field(default_factory=list)


class Guard:
    """Judges each step by its global loss and gradient norm."""

    def __init__(self, config: GuardConfig, saved: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.history = History()
        if saved:
            running = {k: Running(**v) for k, v in saved["running"].items()}
            self.history = History(**({**saved} | {"running": running}))

    def state(self) -> dict[str, Any]:
        """The history as plain JSON values; floats survive JSON bit for bit."""
        return asdict(self.history)

    def _running(self, what: str, task: str) -> Running:
        return self.history.running.setdefault(f"{what}/{task}", Running())

    def limit(self, what: str, task: str) -> float:
        """The largest `loss` or `norm` of a step of `task` that is no spike."""
        running = self._running(what, task)
        if not self.config.sigma or running.count < self.config.window:
            return math.inf
        return running.limit(self.config.sigma, FLOOR[what])

    def judge(self, what: str, task: str, value: float) -> str:
        """Why a global value is not to be trusted; empty if it is."""
        if not math.isfinite(value):
            return f"{what} {value} is not finite"
        limit = self.limit(what, task)
        if value <= limit:
            return ""
        mean = self._running(what, task).mean
        return f"{what} {value:.4g} of {task} is a spike: mean {mean:.4g}, limit {limit:.4g}"

    def accept(self, step: int, task: str, loss: float, norm: float) -> None:
        """Step `step` was applied."""
        self._running("loss", task).add(loss, self.config.window)
        self._running("norm", task).add(norm, self.config.window)
        self._forget(step)

    def skip(self, step: int, known: bool) -> None:
        """Step `step` was skipped; `known` when a sample is to blame, whatever the weights are."""
        self.history.skipped += 1
        self._forget(step)
        if not known:
            self.history.recent.append(step)

    def _forget(self, step: int) -> None:
        self.history.recent = [s for s in self.history.recent if s > step - self.config.window]

    @property
    def must_roll_back(self) -> bool:
        """Whether skipping does not help any more."""
        return len(self.history.recent) > self.config.skips

    @property
    def rollback_limit(self) -> int:
        """The last step at which a checkpoint may stand to be from before the trouble."""
        first = self.history.recent[0]
        if self.history.rollbacks:
            decided, restored = self.history.rollbacks[-1]
            if first <= decided + self.config.window:  # the same trouble: that one was no cure
                return min(first, restored - 1)
        return first

    def gives_up(self, step: int) -> bool:
        """Whether one more rollback, decided at `step`, would be one too many."""
        since = step - 2 * self.config.window
        lately = [1 for decided, _ in self.history.rollbacks if decided > since]
        return len(lately) >= self.config.rollbacks

    def roll_back(self, saved: Mapping[str, Any], decided: int, restored: int) -> None:
        """Take the running statistics of a checkpoint; what was decided since is remembered."""
        before = self.history
        self.history = Guard(self.config, saved).history
        self.history.recent, self.history.skipped = [], before.skipped
        self.history.rollbacks = [*before.rollbacks, [decided, restored]]
