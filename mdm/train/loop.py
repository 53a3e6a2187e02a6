"""The training loop: init, build, load; then loss, backward, step, average, tell, keep.

Ends with 0 when all steps are done, and with 75 (EX_TEMPFAIL) when it was told to stop (SIGTERM)
and saved first: the same command continues it.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil
import torch
from torch import nn

from mdm.config import Config, fingerprint, to_dict
from mdm.data.batch import Batch
from mdm.data.storage import StoreError
from mdm.dist import World, agree, gather_to_all
from mdm.exported import Training, write_export
from mdm.objective import LossTerms
from mdm.tracking import MlflowTracker, NullTracker, Tracker
from mdm.train.checkpoint import Checkpoints, Keep, uri_of, write_synced
from mdm.train.ema import EMA
from mdm.train.engine import Engine
from mdm.train.metrics import Clock, Reporter, Window
from mdm.train.profiling import Profile
from mdm.train.saver import Saver, find
from mdm.train.state import RunError, TrainState, check_resumable, flatten

EXIT_DONE, EXIT_REQUEUE = 0, 75
DONE, TRACKING = "done.json", "tracking.json"


class Loader(Protocol):
    """This rank's stream of batches, with a state that continues it exactly."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch handed out, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for data so far."""

    @property
    def order_digest(self) -> str:
        """Digest of the sample ids handed out so far."""


def learning_rate(step: int, config: Config) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant or cosine to a tenth."""
    train = config.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.decay == "constant":
        return train.lr
    progress = (step - train.warmup) / max(train.steps - train.warmup, 1)
    return train.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def snapshot_steps(steps: int, snapshots: int) -> set[int]:
    """The steps after which averaged weights are exported: evenly spaced, the last one included."""
    return {round(steps * k / snapshots) for k in range(1, snapshots + 1)} - {0}


@dataclass
class Run:
    """All that a running job holds."""

    config: Config
    world: World
    engine: Engine
    ema: EMA
    loader: Loader
    state: TrainState
    tracker: Tracker
    reporter: Reporter
    clock: Clock
    window: Window
    saver: Saver
    profile: Profile

    @property
    def dir(self) -> Path:
        """Folder of checkpoints, exports and logs."""
        return Path(self.config.run_dir)


def train(
    config: Config,
    world: World,
    make_objective: Callable[[Config], nn.Module],
    make_loader: Callable[[Config, World], Loader],
    *,
    resume: str = "auto",
    leaf_classes: Sequence[type[nn.Module]] = (),
    track: bool = True,
    profiled: range = range(0),
) -> int:
    """Train `config` to its last step; all ranks call, after `start_ranks`. Returns the exit code.

    `resume` is `auto` (continue the newest valid checkpoint of `run_dir`) or `none` (start over).
    `profiled` steps leave a trace in `run_dir/profile`. Raises RunError for what the user can mend.
    """
    run_dir, stop = Path(config.run_dir), _StopFlag()
    checkpoints = Checkpoints.at(uri_of(config))
    candidates, passed = find(checkpoints, resume, world)
    if resume == "none" and world.is_main:
        for name in (DONE, TRACKING):
            (run_dir / name).unlink(missing_ok=True)
    if candidates:
        newest = candidates[0].state
        check_resumable(newest, config, f"{checkpoints.store.uri}/{candidates[0].name}")
        if newest.step >= config.train.steps and (run_dir / DONE).exists():
            return EXIT_DONE

    engine = Engine(lambda: make_objective(config), config, world, leaf_classes)
    ema = EMA(engine.fp32_partitions(), config.train.ema, config.train.ema2)
    loader = make_loader(config, world)
    saver = Saver(checkpoints, engine, ema, world, Keep.of(config))
    found, damaged = saver.restore(candidates)
    state = found.state.on_ranks(world.size) if found else TrainState(world_size=world.size)
    state.config = to_dict(config)
    if found:
        loader.load_state_dict(found.manifest["loader"])

    tracker = _start_tracking(config, state, track and world.is_main)
    reporter = Reporter(run_dir, config.train.steps, world, tracker)
    reporter.start(state, fresh=found is None)
    for line in saver.beginning(found, passed + damaged):
        reporter.say(line)
    clock, window = Clock(state.seconds), Window(world, state.window)
    profile = Profile(profiled, run_dir / "profile", world)
    run = Run(
        *(config, world, engine, ema, loader, state, tracker, reporter, clock, window),
        *(saver, profile),
    )
    status = "FAILED"
    try:
        if not take_steps(run, stop):
            status = "KILLED"
            return EXIT_REQUEUE
        export(run_dir / "export", run)
        saver.wait()
        mark_done(run)
        status = "FINISHED"
        return EXIT_DONE
    finally:
        saver.wait()
        for line in saver.news():
            reporter.say(line)
        stop.restore()
        reporter.close()
        tracker.finish(status)


def take_steps(run: Run, stop: "_StopFlag") -> bool:
    """Step until the last one, or until any rank is told to stop; returns whether all are done."""
    state, train = run.state, run.config.train
    snapshots = snapshot_steps(train.steps, train.snapshots)
    while state.step < train.steps:
        with run.profile.step(state.step):
            stopping, rate = take_step(run, stop)
        last = state.step == train.steps
        saving = last or stopping or state.step % train.checkpoint_every == 0
        if last or state.step % train.log_every == 0:
            means = run.window.mean()
            state.loss = means.get("loss")
            values = {**means, "lr": rate, "grad_norm": run.engine.grad_norm, **run.saver.figures}
            for line in run.saver.news():
                run.reporter.say(line)
            run.reporter.log(state, run.clock, values)
        if saving:
            save(run)
        if state.step in snapshots:
            export(run.dir / "snapshots" / f"step-{state.step:08d}", run, needed=False)
        if stopping and not last:
            run.saver.wait()
            at = f"saved at step {run.saver.saved_step}"
            run.reporter.say(f"stopped after step {state.step}, {at}; run again to go on")
            return False
    return True


def take_step(run: Run, stop: "_StopFlag") -> tuple[bool, float]:
    """Loss, backward, step, average; returns whether all ranks shall stop, and the rate."""
    engine, state, clock = run.engine, run.state, run.clock
    with clock.part("data"):
        batch = next(run.loader).to(engine.device)
    if not state.time_to_first_batch:
        state.time_to_first_batch = time.time() - psutil.Process().create_time()
    with clock.part("forward"):
        terms = engine.forward(batch, state.step)
    nonfinite, stopping = agree([not torch.isfinite(terms.total).item(), stop.is_set()])
    if nonfinite:
        _report_nonfinite(terms, batch, state.step)
    with clock.part("backward"):
        engine.backward(terms.total)
    rate = learning_rate(state.step, run.config)
    with clock.part("optimizer"):
        engine.step(rate)
    with clock.part("ema"):
        if engine.was_step_applied:
            run.ema.update(engine.fp32_partitions())
    state.step += 1
    state.samples_seen += run.config.data.global_batch
    run.window.add(batch.task, terms)
    run.reporter.step()
    return stopping, rate


def save(run: Run) -> None:
    """Have everything that the next attempt needs committed; all ranks must call."""
    run.clock.tick("other")
    run.state.seconds, run.state.tracking_id = dict(run.clock.seconds), run.tracker.run_id
    run.state.order_digest = run.loader.order_digest
    run.state.window = run.window.state()
    run.saver.save(run.state, run.loader.state_dict())


def export(folder: Path, run: Run, needed: bool = True) -> None:
    """Write the averaged weights for generation; all ranks must call.

    One that is not `needed` and cannot be written is a warning.
    """
    weights = {kind: run.engine.gather(shadow) for kind, shadow in run.ema.shadows.items()}
    if run.world.is_main:
        state = run.state
        training = Training(state.step, state.samples_seen, state.loss)
        try:
            write_export(folder, run.config, training, weights)
        except (OSError, StoreError) as error:
            if needed:
                raise
            run.reporter.say(f"warning: {folder} is not written: {error}")
    torch.distributed.barrier()


def mark_done(run: Run) -> None:
    """Write the totals that say that all is done; all ranks must call."""
    run.clock.tick("other")
    run.state.seconds = dict(run.clock.seconds)
    totals = run.reporter.totals(run.state, run.loader.wait_seconds)
    if run.world.is_main:
        write_synced(run.dir / DONE, json.dumps(totals, indent=1).encode())
        run.tracker.log_artifact(run.dir / DONE)


def _report_nonfinite(terms: LossTerms, batch: Batch, step: int) -> None:
    """Stop, naming the step and the samples.

    Those whose latents are not finite, if there are any: the other samples of the global batch meet
    them as candidates and in its statistics. Else all samples of the ranks that are to blame.
    """
    value = float(terms.total)
    own = () if math.isfinite(value) else batch.ids
    parts = {k: float(v) for k, v in terms._asdict().items() if v.dim() == 0}
    reports = gather_to_all((value, own, parts, batch.nonfinite()))
    broken = any(bad for *_, bad in reports)
    blamed = [
        f"rank {rank}: loss {value} {parts} from "
        + (f"latents that are not finite of {', '.join(bad)}" if bad else f"{', '.join(ids)}")
        for rank, (value, ids, parts, bad) in enumerate(reports)
        if (bad if broken else ids)
    ]
    raise RunError(f"the loss of step {step} is not finite; {'; '.join(blamed)}")


def _start_tracking(config: Config, state: TrainState, wanted: bool) -> Tracker:
    """One MLflow run a job across its attempts, also of those killed before their first checkpoint.

    The id stands in the checkpoint, and beside it as soon as it is known.
    """
    if not wanted:
        return NullTracker()
    run_dir = Path(config.run_dir)
    key, note = fingerprint(config), run_dir / TRACKING
    run_id = state.tracking_id
    if run_id is None and note.exists():
        former = json.loads(note.read_text())
        run_id = former["run_id"] if former["config"] == key else None

    def remember(started: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_synced(note, json.dumps({"run_id": started, "config": key}).encode())

    tracker = MlflowTracker(config.experiment, run_dir.name, run_id=run_id, on_start=remember)
    tracker.log_params(flatten(to_dict(config)) | {"world_size": state.world_size})
    return tracker


class _StopFlag:
    """Set by SIGTERM; every rank looks at it once a step, and all stop when any was told to."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._former = signal.signal(signal.SIGTERM, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._event.set()

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._event.is_set()

    def restore(self) -> None:
        """Give the signal back to whoever had it."""
        signal.signal(signal.SIGTERM, self._former)
