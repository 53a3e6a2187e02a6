"""What a run reports: `metrics.jsonl`, `events.jsonl`, the progress bar, and the totals at the end.

Metrics are keyed by `samples_seen`. Seconds are wall-clock seconds of rank 0 by part of the step:
data, forward, exchange (losses and votes), backward, optimizer, ema, save, other. `events.jsonl`
logs when attempts started and ended, saves, skipped steps and rollbacks. `mdm.utils.tracking` sends
both files to MLflow.
"""

import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from tqdm import tqdm

from mdm.checkpoint.state import TrainState
from mdm.data.batch import TASKS
from mdm.diffusion.levels import CONDITIONINGS
from mdm.loss import LossTerms
from mdm.storage import StoreError
from mdm.train.throughput import Throughput
from mdm.utils import files
from mdm.utils.progress import EVENTS, METRICS
from mdm.utils.ranks import World, gather_to_all

MODEL_PARTS = ("forward", "backward")
PARTS = ("data", "forward", "exchange", "backward", "optimizer", "ema", "save", "other")
CONDITIONED_TERMS = ("samples", "eps_img", "se_img", "se_txt")
_TERMS = tuple(name for name in LossTerms._fields if name not in ("conditioning", "per_sample"))
_NAMES = (*_TERMS, *(f"{c}/{name}" for c in CONDITIONINGS for name in CONDITIONED_TERMS))
_OLD_ATTEMPTS = "attempts.jsonl"  # of runs that were begun before `events.jsonl` had them
# The fields that a line must have.
_METRICS: files.Shape = {"step": float}
_ATTEMPT: files.Shape = {"started": float, "step": int}
_EVENT: files.Shape = {"event": str, "step": int, "time": float}


class Clock:
    """Seconds by part of the step; time outside of `part` counts as `other`."""

    def __init__(self, start: Mapping[str, float], entering: Callable[[str], None]) -> None:
        self._entering = entering
        self.seconds = {part: start.get(part, 0.0) for part in PARTS}
        self._last = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`."""
        self.tick("other")
        self._entering(name)
        yield
        self.tick(name)

    def tick(self, name: str) -> None:
        """Count the time since the last call as `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now


def sums_by_conditioning(terms: LossTerms) -> torch.Tensor:
    """Sums of CONDITIONED_TERMS over the samples of each conditioning, f64 [CONDITIONINGS, 4]."""
    rows = torch.cat([torch.ones_like(terms.per_sample[:, :1]), terms.per_sample], 1).double()
    sums = rows.new_zeros(len(CONDITIONINGS), len(CONDITIONED_TERMS))
    return sums.index_add_(0, terms.conditioning, rows)


class Window:
    """Sums of loss terms over steps and ranks since the last line of metrics, by task.

    A checkpoint may lie inside a window: `state` is what the next attempt begins with. Sums of fp32
    terms are exact in float64, so that its line of metrics comes out the same.
    """

    def __init__(
        self, world: World, saved: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        self._size = world.size
        self._sums: dict[str, torch.Tensor] = {}
        self._steps: dict[str, int] = defaultdict(int)
        for task, values in (saved or {}).items():
            row = torch.tensor([values[name] for name in _NAMES], dtype=torch.float64)
            self._sums[task] = row if world.is_main else torch.zeros_like(row)
            self._steps[task] = int(values["steps"])

    def add(self, task: str, terms: LossTerms) -> None:
        """Add one step's terms; no communication. All ranks take the same tasks in one order."""
        scalars = torch.stack([t.detach() for t in terms[: len(_TERMS)]]).double()
        row = torch.cat([scalars, sums_by_conditioning(terms).flatten()])
        known = self._sums.get(task)
        self._sums[task] = row if known is None else known.to(row.device) + row
        self._steps[task] += 1

    def state(self) -> dict[str, dict[str, float]]:
        """Sums over steps and ranks by task and term, and `steps`. All ranks must call."""
        if not self._sums:
            return {}
        tasks = sorted(self._sums)
        sums = torch.stack([self._sums[task] for task in tasks])
        torch.distributed.all_reduce(sums)
        return {
            task: {"steps": self._steps[task], **dict(zip(_NAMES, row, strict=True))}
            for task, row in zip(tasks, sums.tolist(), strict=True)
        }

    def mean(self) -> dict[str, float]:
        """Means: `loss`, `task/term` and `conditioning/term`; then empty. All ranks must call.

        A task's terms are means over steps and ranks, a conditioning's over the samples that had
        it. A term that was 0 throughout is one that the task does not have, and is left out.
        """
        sums_of = self.state()
        if not sums_of:
            return {}
        total = sum(values["total"] for values in sums_of.values())
        means = {"loss": total / self._size / sum(self._steps.values())}
        for task, values in sums_of.items():
            for name in _TERMS:
                if values[name] != 0.0:
                    means[f"{task}/{name}"] = values[name] / self._size / values["steps"]
        for conditioning in CONDITIONINGS:
            samples, *sums = (
                sum(values[f"{conditioning}/{name}"] for values in sums_of.values())
                for name in CONDITIONED_TERMS
            )
            for name, value in zip(CONDITIONED_TERMS[1:], sums, strict=True):
                if value != 0.0:
                    means[f"{conditioning}/{name}"] = value / samples
        self._sums, self._steps = {}, defaultdict(int)
        return means


class Reporter:
    """Writes the run's log files and shows the progress bar on rank 0; a no-op on other ranks.

    Once `has_folder` says that another job has taken the run over, no file is written any more.
    """

    def __init__(
        self,
        run_dir: str | Path,
        steps: int,
        world: World,
        has_folder: Callable[[], bool] = lambda: True,
    ) -> None:
        self.run_dir, self.world = Path(run_dir), world
        self.events = self.run_dir / EVENTS
        self._metrics = self.run_dir / METRICS
        self._has_folder = has_folder
        self._steps = steps
        self._bar: Any = None
        self._before: dict[str, float] | None = None
        self._samples_before = 0
        self._started = psutil.Process().create_time()
        self._restart_seconds: dict[str, float] | None = None  # for the first line of metrics
        self._attempts: list[dict[str, Any]] = [{"started": time.time(), "step": 0}]

    def start(self, state: TrainState, fresh: bool) -> None:
        """Log a new attempt, drop the metrics of steps that will be repeated, show the bar."""
        if not self.world.is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        old_attempts = self.run_dir / _OLD_ATTEMPTS
        if fresh:
            for path in (self._metrics, self.events, old_attempts):
                files.set_folder_aside(path)
                path.unlink(missing_ok=True)
        # A running attempt updates the modification time: see `Heartbeat.log`.
        ends = [p.stat().st_mtime for p in (self.events, old_attempts) if p.is_file()]
        self._drop_lines(state.step)
        events = files.read_lines(self.events, _EVENT, repair=True)
        started = [e for e in events if e["event"] == "started" and not files.mismatch(e, _ATTEMPT)]
        former = files.read_lines(old_attempts, _ATTEMPT) + started
        for row in former:
            if files.mismatch(row, {"former_ended": float}):
                row.pop("former_ended", None)
        attempt = {"started": self._started} | ({"former_ended": max(ends)} if ends else {})
        self._attempts = [*former, attempt]
        self.note("started", state, **attempt)
        self._before, self._samples_before = None, state.samples_seen
        self._bar = tqdm(
            total=self._steps, initial=state.step, unit="step", dynamic_ncols=True, mininterval=1.0
        )

    def _drop_lines(self, step: int) -> None:
        """Drop the lines of metrics after `step`, and damaged ones."""
        rows = files.read_lines(self._metrics, _METRICS, repair=True)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            try:
                files.write_lines(self._metrics, kept)
            except OSError as error:
                raise StoreError(f"cannot write {self._metrics}: {error.strerror}") from error

    def rewind(self, state: TrainState) -> None:
        """Return to `state`: drop the metrics of steps that will be repeated."""
        if not self.world.is_main or not self._has_folder():
            return
        self._drop_lines(state.step)
        self._before, self._samples_before = None, state.samples_seen
        self._bar.n = state.step
        self._bar.refresh()

    def step(self) -> None:
        """Advance the bar; at the first step, measure how long that took."""
        if self._restart_seconds is None:
            self._restart_seconds = {"restart_seconds": time.time() - self._started}
        if self._bar is not None:
            self._bar.update()

    def log(
        self, state: TrainState, clock: Clock, work: Throughput, values: Mapping[str, float]
    ) -> None:
        """Write one line of metrics: `values`, speeds, shares of the step, rank 0's machine."""
        if not self.world.is_main or not self._has_folder():
            return
        before = self._before or dict.fromkeys(PARTS, 0.0) | (state.seconds or {})
        spent = {p: clock.seconds[p] - before[p] for p in PARTS}
        total = sum(spent.values()) or math.nan
        samples = state.samples_seen - self._samples_before
        speeds = {
            "samples_per_second": samples / total,
            **work.rates(total),
            "share_outside_model": 1 - sum(spent[p] for p in MODEL_PARTS) / total,
            **{f"share/{p}": spent[p] / total for p in PARTS},
            "goodput": self._goodput(clock.seconds)[0],
            **(self._restart_seconds or {}),
        }
        self._before, self._samples_before = dict(clock.seconds), state.samples_seen
        self._restart_seconds = {}
        row = {"step": state.step, "samples_seen": state.samples_seen, **values, **speeds}
        row |= {**_system(), "time": time.time()}
        try:
            files.append_line(self._metrics, row)
        except OSError as error:
            self.say(f"warning: {self._metrics.name} lacks step {state.step}: {error}")
        shown = {
            name.split("/")[-1]: f"{value:.3f}"
            for name, value in values.items()
            if name == "loss" or (name.split("/")[0] in TASKS and not name.endswith("/total"))
        }
        shown["samples/s"] = f"{speeds['samples_per_second']:.0f}"
        if "mfu" in speeds:
            shown["MFU"] = f"{speeds['mfu']:.1%}"
        self._bar.set_postfix(shown, refresh=False)

    def note(self, event: str, state: TrainState, **facts: Any) -> None:
        """Write a line to `events.jsonl`; `artifacts` are sent to MLflow."""
        if self.world.is_main and self._has_folder():
            row = {"event": event, "step": state.step, "time": time.time(), **facts}
            try:
                files.append_line(self.events, row)
            except OSError as error:  # a full disk costs the line, not the run
                files.warn_once(f"warning: {self.events} lacks events: {error}")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def totals(self, state: TrainState, wait_seconds: float) -> dict[str, Any]:
        """The content of `done.json`. All ranks must call.

        `wall_seconds` is the time during which an attempt was alive, `goodput` the share of it
        whose work is in the weights; `span_seconds` also counts the pauses between attempts.
        """
        # Linux counts ru_maxrss in KiB.
        peaks = gather_to_all(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        if not self.world.is_main:
            return {}
        useful = sum(state.seconds.values())
        goodput, wall, span, attempts = self._goodput(state.seconds)
        return {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "attempts": attempts,
            "wall_seconds": wall,
            "span_seconds": span,
            "step_seconds": useful,
            "goodput": goodput,
            "samples_per_second": state.samples_seen / useful,
            "share_outside_model": 1 - sum(state.seconds[p] for p in MODEL_PARTS) / useful,
            "data_wait_share": state.seconds["data"] / useful,
            "loader_wait_seconds": wait_seconds,
            "seconds": state.seconds,
            "time_to_first_batch": state.time_to_first_batch,
            "peak_rss_gib": sum(peaks),
            "peak_rss_gib_per_rank": peaks,
            "order_digest": state.order_digest,
            "world_size": self.world.size,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }

    def _goodput(self, seconds: Mapping[str, float]) -> tuple[float, float, float, int]:
        """Useful share of the attempts' time; that time; time since the first start; attempts."""
        attempts = self._attempts
        ends = [a["former_ended"] for a in attempts[1:] if "former_ended" in a] + [time.time()]
        starts = [a["started"] for a in attempts][-len(ends) :]
        wall = sum(max(end - start, 0.0) for start, end in zip(starts, ends, strict=True))
        useful = sum(seconds.values())
        return min(useful / wall, 1.0) if wall else 0.0, wall, ends[-1] - starts[0], len(attempts)


def _system() -> dict[str, float]:
    """Load of rank 0's machine, under the names that MLflow shows as system metrics."""
    memory = psutil.virtual_memory()
    load = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": psutil.disk_usage(".").percent,
    }
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        load[f"system/gpu_{i}_memory_usage_megabytes"] = (total - free) / 1e6
        load[f"system/gpu_{i}_memory_usage_percentage"] = 100 * (1 - free / total)
    return load
