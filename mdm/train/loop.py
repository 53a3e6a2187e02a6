"""The training loop.

`train` sets up and restores a run; each step then is forward, check, backward, optimizer, EMA, log,
checkpoint. It ends with DONE after the last step; after saving, with REQUEUE if a signal or the
supervisor requested a stop, and with HALTED if the stop file of `run_dir` did.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from mdm.checkpoint.checkpoints import Checkpoints, Keep, uri_of
from mdm.checkpoint.state import RunError, TrainState, check_resumable, resolve_precision
from mdm.config import Config
from mdm.data.loader import Loader
from mdm.storage import open_store
from mdm.train import outcome, recovery
from mdm.train.beginning import on_every_rank, prepare
from mdm.train.ema import EMA
from mdm.train.engine import Engine, device_of_rank
from mdm.train.guard import Guard
from mdm.train.heartbeat import STOP_FILE, Heartbeat, report_end
from mdm.train.metrics import Clock, Reporter, Window
from mdm.train.profiling import Profile
from mdm.train.run import Draw, Run
from mdm.train.saver import Saver, find
from mdm.train.throughput import Ranks, Throughput
from mdm.train.writer import only_writer
from mdm.utils.exit_codes import DONE, GAVE_UP, HALTED
from mdm.utils.precision import describe
from mdm.utils.ranks import World, exchange
from mdm.utils.saved_config import to_dict
from mdm.utils.tracking import NullTracker

NEVER = -1.0  # a limit that every norm exceeds


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of `step` (from 0): linear warm-up, then constant or cosine to a tenth."""
    train = config.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.decay == "constant":
        return train.lr
    progress = (step - train.warmup) / max(train.steps - train.warmup, 1)
    return train.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def snapshot_steps(steps: int, snapshots: int) -> set[int]:
    """The steps after which averaged weights are exported: evenly spaced, including the last."""
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
    """Train `config` to its last step; all ranks must call, after `start_ranks`.

    `make_loss` builds the module that is trained, which maps (batch, step) to `LossTerms`;
    `make_loader` opens this rank's data. `resume` `auto` continues the newest valid checkpoint,
    `none` starts over. ZeRO-3 gathers modules of `leaf_classes` as a whole. With `track`, metrics
    and artifacts are sent to MLflow. Steps `profiled` leave a trace in `run_dir/profile`. `draw`
    draws images with each snapshot. Returns the exit code.

    Raises:
        RunError: the user can fix the problem; the message says how.
        OtherRunError: another job writes to the run.
    """
    with only_writer(config, world) as writer:
        run_dir = Path(config.run_dir)
        checkpoints = Checkpoints(open_store(uri_of(config)), writer.confirm)
        candidates, skipped = find(checkpoints, resume, world)
        newest = candidates[0] if candidates else None
        config = resolve_precision(config, newest.state if newest else None, device_of_rank().type)
        lines: list[str] = []
        path = f"{checkpoints.store.uri}/{newest.name}" if newest else ""
        if newest:
            lines = check_resumable(newest.state, config, path)
            finished = newest.step >= config.train.steps
            if finished and outcome.done_before(config, checkpoints, newest, world, track):
                return DONE
        prepared = prepare(config, world, make_loader, newest, path)
        if resume == "none":
            on_every_rank(lambda: _start_over(run_dir, checkpoints, world, track), world)

        heartbeat = Heartbeat(run_dir, world.rank, world.size, config.train.hang_seconds)
        engine = Engine(lambda: make_loss(config), config, world, leaf_classes)
        ema = EMA(engine.shards.partitions(), config.train.ema, config.train.ema2)
        saver = Saver(checkpoints, engine, ema, world, Keep.of(config))
        heartbeat.enter("load")
        record, damaged = saver.restore(candidates)
        state = record.state.on_ranks(world.size) if record else TrainState(world_size=world.size)
        state.config, state.deepspeed = to_dict(config), prepared.deepspeed
        if record:
            prepared.loader.load_state_dict(record.manifest["loader"])

        writer.agree()  # loading may have taken long
        reporter = Reporter(run_dir, config.train.steps, world, writer.has_folder)
        reporter.start(state, fresh=record is None)
        tracker = outcome.start_tracking(config, state, track and world.is_main)
        if world.is_main:
            heartbeat.log = reporter.events
        for line in [*lines, *prepared.lines, *saver.beginning(record, skipped + damaged)]:
            reporter.say(line)
        reporter.say(f"precision: {describe(config.train.precision, engine.device.type)}")
        run = Run(
            config=config,
            world=world,
            engine=engine,
            ema=ema,
            loader=prepared.loader,
            state=state,
            tracker=tracker,
            reporter=reporter,
            clock=Clock(state.seconds, heartbeat.enter),
            window=Window(world, state.window),
            saver=saver,
            guard=Guard(config.guard, state.guard),
            heartbeat=heartbeat,
            work=Throughput(config, world),
            ranks=Ranks(engine.device),
            profile=Profile(profiled, run_dir / "profile", world),
            writer=writer,
            draw=draw,
            tokenizer=prepared.tokenizer,
        )
        code = _run(run)
        torch.distributed.barrier()  # a launcher ends all ranks once one is gone
        return code


def _start_over(run_dir: Path, checkpoints: Checkpoints, world: World, track: bool) -> None:
    if world.is_main:
        checkpoints.set_all_aside("started over with --resume none")
        outcome.forget_former(run_dir, track)


def _run(run: Run) -> int:
    """Take the steps, and record how the attempt ended; returns the exit code."""
    status = "FAILED"
    try:
        code = take_steps(run)
        run.heartbeat.enter("end")
        if code == DONE:
            run.writer.agree()
            outcome.export(run.dir / outcome.EXPORT, run)
        run.saver.wait()
        if code == DONE:
            run.writer.agree()
            outcome.mark_done(run)
        status = "FINISHED" if code == DONE else "KILLED"
        return code
    except Exception as error:  # reported at once: what follows may take a while
        if run.writer.lost:  # the MLflow run is the other job's now
            run.tracker = NullTracker()
        report_end(getattr(error, "code", GAVE_UP), _first_line(error))
        raise
    finally:
        run.heartbeat.enter("end")
        run.saver.wait()
        report_saves(run)
        artifacts = {outcome.DONE: outcome.DONE} if status == "FINISHED" else {}
        run.reporter.note("ended", run.state, status=status, artifacts=artifacts)
        run.reporter.close()
        run.tracker.finish(status)
        run.heartbeat.close()


def take_steps(run: Run) -> int:
    """Step until the last step, or until a stop of any rank is requested; returns the exit code."""
    train = run.config.train
    snapshots = snapshot_steps(train.steps, train.snapshots)
    while run.state.step < train.steps:
        with run.profile.step(run.state.step):
            stop, rate = take_step(run)
        state = run.state
        if run.guard.must_roll_back:
            recovery.roll_back(run)
            continue
        is_last = state.step == train.steps
        if is_last or state.step % train.log_every == 0:
            means = run.window.mean()
            state.loss = means.get("loss", state.loss)
            values = {**means, "lr": rate, "grad_norm": run.engine.grad_norm, **run.saver.figures}
            values |= run.ranks.measure(run.clock.seconds["data"])
            values["guard/skipped"] = run.guard.history.skipped
            report_saves(run)
            run.reporter.log(state, run.clock, run.work, values)
        if is_last or stop or state.step % train.checkpoint_every == 0:
            run.writer.agree()
            save(run)
        if state.step in snapshots:
            run.writer.agree()
            run.heartbeat.enter("export")
            folder = run.dir / outcome.SNAPSHOTS / f"step-{state.step:08d}"
            outcome.export(folder, run, needed=False)
            outcome.show(folder, run)
        if stop and not is_last:
            run.saver.wait()
            how = f"remove {STOP_FILE} and run again" if stop == HALTED else "run again"
            saved = run.saver.saved_step
            run.reporter.say(f"stopped after step {state.step}, saved at step {saved}; {how}")
            return stop
    return DONE


def take_step(run: Run) -> tuple[int, float]:
    """One step: forward, check, backward, optimizer, EMA.

    Returns the exit code of a requested stop (0 for none), and the learning rate.
    """
    engine, state, clock, guard = run.engine, run.state, run.clock, run.guard
    run.heartbeat.begin_step(state.step)
    with clock.part("data"):
        batch = next(run.loader)
    if not state.time_to_first_batch:
        state.time_to_first_batch = time.time() - psutil.Process().create_time()
    buffers = engine.buffers()
    with clock.part("forward"):
        terms = engine.forward(batch, state.step)
    with clock.part("exchange"):
        vote = [float(terms.total.detach()), run.heartbeat.requested, float(run.writer.lost)]
        losses, stops, lost = zip(*exchange(vote, engine.device), strict=True)
    if any(lost):
        run.writer.agree()
    loss = sum(losses) / len(losses)
    trouble = guard.judge("loss", batch.task, loss)
    with clock.part("backward"):
        engine.backward(terms.total)
    rate = learning_rate(state.step, run.config)
    with clock.part("optimizer"):
        engine.step(rate, NEVER if trouble else guard.limit("norm", batch.task))
    trouble = trouble or guard.judge("norm", batch.task, engine.grad_norm)
    if trouble:
        engine.restore_buffers(buffers)
        recovery.skip(run, batch, terms, loss, trouble)
    else:
        with clock.part("ema"):
            run.ema.update(engine.shards.partitions())
        guard.accept(state.step, batch.task, loss, engine.grad_norm)
        run.window.add(batch.task, terms)
    run.work.add(batch)
    state.step += 1
    state.samples_seen += run.config.data.global_batch
    run.reporter.step()
    return HALTED if HALTED in stops else int(max(stops)), rate


def save(run: Run) -> None:
    """Start committing everything that the next attempt needs; all ranks must call."""
    run.clock.tick("other")
    run.state.seconds = dict(run.clock.seconds)
    run.state.tracking_id = run.tracker.identity or run.state.tracking_id  # kept if not tracked now
    run.state.order_digest = run.loader.order_digest
    run.state.window = run.window.state()
    run.state.guard = run.guard.state()
    with run.clock.part("save"):
        run.saver.save(run.state, run.loader.state_dict())


def report_saves(run: Run) -> None:
    """Report the saves since the last call; a committed one is linked in MLflow."""
    for line in run.saver.messages():
        run.reporter.say(line)
    step = run.saver.saved_step
    if run.world.is_main and step > run.linked_step:
        run.linked_step = step
        link = {"uri": run.saver.checkpoints.store.uri, "step": step}
        facts = {**run.saver.figures, "artifacts": {f"checkpoints/step-{step:08d}.json": link}}
        run.reporter.note("saved", run.state, saved_step=step, **facts)


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, RunError) else f"{type(error).__name__}: {line}"
