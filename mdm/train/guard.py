"""Detects steps with a loss or gradient norm that is not finite, or a spike.

Each task has running means and deviations of its loss and of its gradient norm, over applied steps
only. All ranks decide alike, because the decision depends only on numbers that they share; a
resumed run decides like an undisturbed one, because the statistics are part of the checkpoint:

    a bad step           is skipped: weights, averages and buffers stay as they were
    more than `skips` of them within `window` steps
                         the run returns to a checkpoint from before the first of them, and the
                         samples of the skipped steps and of the `suspects` before are blocked
    more than `rollbacks` of these without `window` good steps between them
                         the run ends: the data is not the cause
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mdm.config import GuardConfig

# The deviation is taken to be at least this share of the mean: that of a steady loss is close to 0,
# and gradient norms vary far more than losses in healthy training.
FLOOR = {"loss": 0.1, "norm": 0.5}


@dataclass
class Running:
    """Exponentially weighted mean and variance; a plain mean until `window` values were seen."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float, window: int) -> None:
        """Add an accepted value."""
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
    """The guard's state, as it is saved in a checkpoint."""

    running: dict[str, Running] = field(default_factory=dict)  # "loss/task", "norm/task"
    recent: list[int] = field(default_factory=list)  # skipped steps of the last `window`
    skipped: int = 0
    # Pairs: the step at which the rollback was decided, and the checkpoint's step.
    rollbacks: list[list[int]] = field(default_factory=list)


class Guard:
    """Judges each step by its global loss and gradient norm."""

    def __init__(self, config: GuardConfig, saved: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.history = History()
        if saved:
            self.history = History(**saved)
            self.history.running = {k: Running(**v) for k, v in saved["running"].items()}

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
        """Why a global value counts as bad; empty if it is good."""
        if not math.isfinite(value):
            return f"{what} {value} is not finite"
        limit = self.limit(what, task)
        if value <= limit:
            return ""
        mean = self._running(what, task).mean
        return f"{what} {value:.4g} of {task} is a spike: mean {mean:.4g}, limit {limit:.4g}"

    def accept(self, step: int, task: str, loss: float, norm: float) -> None:
        """Record that step `step` was applied."""
        self._running("loss", task).add(loss, self.config.window)
        self._running("norm", task).add(norm, self.config.window)
        self._forget(step)

    def skip(self, step: int, known: bool) -> None:
        """Record that step `step` was skipped; `known` if a damaged sample was the cause."""
        self.history.skipped += 1
        self._forget(step)
        if not known:
            self.history.recent.append(step)

    def _forget(self, step: int) -> None:
        self.history.recent = [s for s in self.history.recent if s > step - self.config.window]

    @property
    def must_roll_back(self) -> bool:
        """Whether too many of the last steps were skipped."""
        return len(self.history.recent) > self.config.skips

    @property
    def rollback_limit(self) -> int:
        """The last step at which a checkpoint is from before the trouble."""
        first = self.history.recent[0]
        if self.history.rollbacks:
            decided, restored = self.history.rollbacks[-1]
            if first <= decided + self.config.window:  # that rollback did not help
                return min(first, restored - 1)
        return first

    def gives_up(self, step: int) -> bool:
        """Whether one more rollback, decided at `step`, would be one too many."""
        since = step - 2 * self.config.window
        lately = sum(decided > since for decided, _ in self.history.rollbacks)
        return lately >= self.config.rollbacks

    def roll_back(self, saved: Mapping[str, Any], decided: int, restored: int) -> None:
        """Restore the statistics of a checkpoint, but keep the counts of skips and rollbacks."""
        before = self.history
        self.history = Guard(self.config, saved).history
        self.history.recent, self.history.skipped = [], before.skipped
        self.history.rollbacks = [*before.rollbacks, [decided, restored]]
