"""The training loop: init, build, load; then loss, judge, backward, step, average, tell, keep.

It ends with DONE when all steps are done, with REQUEUE when a signal or its supervisor told it to
stop, and with HALTED when the stop file of `run_dir` did: either way it has saved, and the same
command continues it.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from mdm.checkpoint.checkpoints import Checkpoints, Keep, uri_of
from mdm.checkpoint.state import RunError, TrainState, check_resumable, settled
from mdm.config import Config, to_dict
from mdm.storage import open_store
from mdm.train import recovery
from mdm.train.beginning import on_every_rank, prepare
from mdm.train.ema import EMA
from mdm.train.engine import Engine, device_of_rank
from mdm.train.guard import Guard
from mdm.train.heartbeat import STOP_FILE, Heartbeat, report_end
from mdm.train.metrics import Clock, Reporter, Window
from mdm.train.outcome import (
    EXPORT,
    SNAPSHOTS,
    done_before,
    export,
    forget_former,
    mark_done,
    show,
    start_tracking,
)
from mdm.train.profiling import Profile
from mdm.train.run import Draw, Loader, Run
from mdm.train.saver import Saver, find
from mdm.train.throughput import Ranks, Throughput
from mdm.train.writer import Writer, only_writer
from mdm.utils.exit_codes import DONE as EXIT_DONE
from mdm.utils.exit_codes import GAVE_UP, HALTED
from mdm.utils.precision import describe
from mdm.utils.ranks import World, exchange
from mdm.utils.tracking import NullTracker

NEVER = -1.0  # a limit that no norm is below


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


def train(
    config: Config,
    world: World,
    make_loss: Callable[[Config], nn.Module],
    make_loader: Callable[[Config, World], Loader],
    *,
    resume: str = "auto",
    leaf_classes: Sequence[type[nn.Module]] = (),
    track: bool = True,
    profiled: range = range(0),
    draw: Draw | None = None,
) -> int:
    """Train `config` to its last step; all ranks call, after `start_ranks`. Returns the exit code.

    `resume` is `auto` (continue the newest valid checkpoint of `run_dir`) or `none` (start over).
    `profiled` steps leave a trace in `run_dir/profile`, `draw` makes images with each snapshot.
    Raises RunError for what the user can mend, OtherRunError where another job writes to the run.
    """
    with only_writer(config, world) as writer:
        start = functools.partial(_train, config, world, make_loss, make_loader, writer)
        return start(resume, leaf_classes, track, profiled, draw)


def _train(
    config: Config,
    world: World,
    make_loss: Callable[[Config], nn.Module],
    make_loader: Callable[[Config, World], Loader],
    writer: Writer,
    resume: str,
    leaf_classes: Sequence[type[nn.Module]],
    track: bool,
    profiled: range,
    draw: Draw | None,
) -> int:
    """Set up and restore, then take the steps; see `train`."""
    run_dir = Path(config.run_dir)
    checkpoints = Checkpoints(open_store(uri_of(config)), writer.confirm)
    candidates, passed = find(checkpoints, resume, world)
    newest = candidates[0].state if candidates else None
    config = settled(config, newest, device_of_rank().type)
    said: list[str] = []
    path = ""
    if newest:
        path = f"{checkpoints.store.uri}/{candidates[0].name}"
        said = check_resumable(newest, config, path)
        finished = newest.step >= config.train.steps
        if finished and done_before(config, checkpoints, candidates[0], world, track):
            return EXIT_DONE
    begun = prepare(config, world, make_loader, candidates[0] if candidates else None, path)
    if resume == "none":
        on_every_rank(lambda: _start_over(run_dir, checkpoints, world, track), world)

    heartbeat = Heartbeat(run_dir, world.rank, world.size, config.train.hang_seconds)
    engine = Engine(lambda: make_loss(config), config, world, leaf_classes)
    ema = EMA(engine.fp32_partitions(), config.train.ema, config.train.ema2)
    saver = Saver(checkpoints, engine, ema, world, Keep.of(config))
    heartbeat.enter("load")
    found, damaged = saver.restore(candidates)
    state = found.state.on_ranks(world.size) if found else TrainState(world_size=world.size)
    state.config, state.deepspeed = to_dict(config), begun.deepspeed
    if found:
        begun.loader.load_state_dict(found.manifest["loader"])

    writer.agree()  # loading may have taken long
    tracker = start_tracking(config, state, track and world.is_main)
    reporter = Reporter(run_dir, config.train.steps, world, tracker, writer.has_folder)
    reporter.start(state, fresh=found is None)
    if world.is_main:
        heartbeat.pulse = reporter.attempts
    for line in [*said, *begun.said, *saver.beginning(found, passed + damaged)]:
        reporter.say(line)
    reporter.say(f"precision: {describe(config.train.precision, engine.device.type)}")
    run = Run(
        *(config, world, engine, ema, begun.loader, state, tracker, reporter),
        Clock(state.seconds, heartbeat.enter),
        Window(world, state.window),
        saver,
        Guard(config.guard, state.guard),
        heartbeat,
        Throughput(config, world),
        Ranks(engine.device),
        Profile(profiled, run_dir / "profile", world),
        writer,
        draw,
        begun.tokenizer,
    )
    code = _run(run)
    torch.distributed.barrier()  # a launcher ends all ranks once one is gone
    return code


def _start_over(run_dir: Path, checkpoints: Checkpoints, world: World, track: bool) -> None:
    if world.is_main:
        checkpoints.set_all_aside("started over with --resume none")
        forget_former(run_dir, track)


def _run(run: Run) -> int:
    """Take the steps and say how it ended, however it ends; returns the exit code."""
    status = "FAILED"
    try:
        code = take_steps(run)
        run.heartbeat.enter("end")
        if code == EXIT_DONE:
            run.writer.agree()
            export(run.dir / EXPORT, run)
        run.saver.wait()
        if code == EXIT_DONE:
            run.writer.agree()
            mark_done(run)
        status = "FINISHED" if code == EXIT_DONE else "KILLED"
        return code
    except Exception as error:  # told at once: what follows may take a while
        if run.writer.lost:  # the run's MLflow entries are the other job's now
            run.tracker = run.reporter.tracker = NullTracker()
        report_end(getattr(error, "code", GAVE_UP), _first_line(error))
        raise
    finally:
        run.heartbeat.enter("end")
        run.saver.wait()
        tell_saved(run)
        run.reporter.note("ended", run.state, status=status)
        run.reporter.close()
        run.tracker.finish(status)
        run.heartbeat.close()


def take_steps(run: Run) -> int:
    """Step until the last one, or until any rank is asked to stop; returns the exit code."""
    train = run.config.train
    snapshots = snapshot_steps(train.steps, train.snapshots)
    first = True
    while run.state.step < train.steps:
        with run.profile.step(run.state.step):
            asked, rate = take_step(run)
        state = run.state
        if first:
            first = False
            run.reporter.first_step(state)
        if run.guard.must_roll_back:
            recovery.roll_back(run)
            continue
        last = state.step == train.steps
        if last or state.step % train.log_every == 0:
            means = run.window.mean()
            state.loss = means.get("loss", state.loss)
            values = {**means, "lr": rate, "grad_norm": run.engine.grad_norm, **run.saver.figures}
            values |= run.ranks.measure(run.clock.seconds["data"])
            values["guard/skipped"] = run.guard.history.skipped
            tell_saved(run)
            run.reporter.log(state, run.clock, run.work, values)
        if last or asked or state.step % train.checkpoint_every == 0:
            run.writer.agree()
            save(run)
        if state.step in snapshots:
            run.writer.agree()
            run.heartbeat.enter("export")
            folder = run.dir / SNAPSHOTS / f"step-{state.step:08d}"
            export(folder, run, needed=False)
            show(folder, run)
        if asked and not last:
            run.saver.wait()
            how = f"once {STOP_FILE} is removed, " if asked == HALTED else ""
            at = f"saved at step {run.saver.saved_step}"
            run.reporter.say(f"stopped after step {state.step}, {at}; {how}run again to go on")
            return asked
    return EXIT_DONE


def take_step(run: Run) -> tuple[int, float]:
    """Loss, judge, backward, step, average; returns what the ranks are asked, and the rate."""
    engine, state, clock, guard = run.engine, run.state, run.clock, run.guard
    run.heartbeat.begin_step(state.step)
    with clock.part("data"):
        batch = next(run.loader)
    if not state.time_to_first_batch:
        state.time_to_first_batch = time.time() - psutil.Process().create_time()
    kept = engine.buffers()
    with clock.part("forward"):
        terms = engine.forward(batch, state.step)
    with clock.part("exchange"):
        own = [float(terms.total.detach()), run.heartbeat.asked, float(run.writer.lost)]
        votes = exchange(own, engine.device)
    if any(vote[2] for vote in votes):
        run.writer.agree()
    loss, asks = sum(vote[0] for vote in votes) / len(votes), {int(vote[1]) for vote in votes}
    trouble = guard.judge("loss", batch.task, loss)
    with clock.part("backward"):
        engine.backward(terms.total)
    rate = learning_rate(state.step, run.config)
    with clock.part("optimizer"):
        engine.step(rate, NEVER if trouble else guard.limit("norm", batch.task))
    trouble = trouble or guard.judge("norm", batch.task, engine.grad_norm)
    if trouble:
        engine.restore_buffers(kept)
        recovery.skip(run, batch, terms, loss, trouble)
    else:
        with clock.part("ema"):
            run.ema.update(engine.fp32_partitions())
        guard.accept(state.step, batch.task, loss, engine.grad_norm)
        run.window.add(batch.task, terms)
    run.work.add(batch)
    state.step += 1
    state.samples_seen += run.config.data.global_batch
    run.reporter.step()
    return HALTED if HALTED in asks else max(asks), rate


def save(run: Run) -> None:
    """Have everything that the next attempt needs committed; all ranks must call."""
    run.clock.tick("other")
    run.state.seconds = dict(run.clock.seconds)
    run.state.tracking_id = run.tracker.run_id or run.state.tracking_id  # kept if not tracked now
    run.state.order_digest = run.loader.order_digest
    run.state.window = run.window.state()
    run.state.guard = run.guard.state()
    with run.clock.part("save"):
        run.saver.save(run.state, run.loader.state_dict())


def tell_saved(run: Run) -> None:
    """Say what became of the saves since the last call; a committed one is linked in MLflow."""
    for line in run.saver.news():
        run.reporter.say(line)
    step = run.saver.saved_step
    if run.world.is_main and step > run.linked_step:
        run.linked_step = step
        run.reporter.note("saved", run.state, saved_step=step, **run.saver.figures)
        link = {"uri": run.saver.checkpoints.store.uri, "step": step}
        run.tracker.log_text(json.dumps(link, indent=1), f"checkpoints/step-{step:08d}.json")


def _first_line(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, RunError) else f"{type(error).__name__}: {said}"
