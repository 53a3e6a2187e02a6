"""What follows from the guard's verdicts: skipped steps with their replay boxes, and rollbacks."""

import math
from typing import Any

from mdm.checkpoint.checkpoints import Record
from mdm.checkpoint.state import Diverged
from mdm.data.batch import Batch
from mdm.train import replay_box
from mdm.train.metrics import Clock, Window
from mdm.train.run import Run
from mdm.utils.ranks import from_main, gather_to_all


def skip(run: Run, batch: Batch, terms: Any, loss: float, reason: str) -> None:
    """Step `run.state.step` was not applied: log why, keep it, block the samples to blame.

    All ranks must call, after weights and buffers are as they were before the step.
    """
    guard, step = run.guard, run.state.step
    scalars = {name: float(v.detach()) for name, v in terms._asdict().items() if v.dim() == 0}
    shares = gather_to_all((scalars, batch.nonfinite(), batch.to("cpu")))
    broken = sorted(i for _, bad, _ in shares for i in bad)
    weights = None
    if run.config.guard.replay_boxes and not guard.history.recent:  # the first of its trouble
        weights = run.engine.shards.gather(run.engine.shards.partitions())
    if run.world.is_main:
        message = _describe(step, reason, shares)
        report = {
            "reason": reason,
            "blame": message,
            "task": batch.task,
            "loss": loss,
            "grad_norm": run.engine.grad_norm,
            "losses": [terms for terms, _, _ in shares],
            "statistics": guard.state()["running"],
            "broken": broken,
        }
        try:
            whole = replay_box.join([part for *_, part in shares])
            folder = replay_box.write(run.dir, run.config, step, report, whole, weights)
            message += f"; replay box: {folder}"
        except OSError as error:  # a full disk costs the box, not the run
            message += f"; no replay box: {error.strerror}"
        run.reporter.say(message)
        run.reporter.note("skipped", run.state, reason=message)
    if broken:  # their latents are NaN or Inf: no weights could give a finite loss
        run.loader.block(broken)
    guard.skip(step, known=bool(broken))


def _describe(step: int, reason: str, shares: list[tuple[dict[str, float], Any, Batch]]) -> str:
    """One line: why the step is skipped, and because of which samples of which ranks.

    These are the samples whose latents are not finite, if there are any: they reach the other
    samples of the global batch as candidates and in its statistics. Otherwise they are all samples
    of the ranks whose loss is not finite.
    """
    blamed = []
    for rank, (terms, bad, part) in enumerate(shares):
        if bad:
            blamed.append(f"rank {rank}: latents that are not finite of {', '.join(bad)}")
        elif not math.isfinite(terms["total"]) and not any(b for _, b, _ in shares):
            values = ", ".join(f"{k} {v:.4g}" for k, v in terms.items())
            blamed.append(f"rank {rank}: {values} from {', '.join(part.ids)}")
    return "; ".join([f"step {step} is skipped: {reason}", *blamed])


def roll_back(run: Run) -> None:
    """Return to a checkpoint from before the trouble, and add its samples to the blocklist.

    All ranks must call. Raises Diverged if earlier rollbacks have not helped, or there is no
    checkpoint to return to.
    """
    guard, decided = run.guard, run.state.step
    skipped = list(guard.history.recent)
    suspects = range(max(skipped[0] - guard.config.suspects, 0), skipped[0])
    ids = {i for s in (*suspects, *skipped) for i in run.loader.sample_ids(s)}
    where = f"steps {skipped[0]} to {skipped[-1]} ({len(skipped)} of them skipped)"
    if guard.gives_up(decided):
        raise Diverged(
            f"no way past {where}: going back {len(guard.history.rollbacks)} times with other "
            "samples did not help. See the runbook of loss spikes; lower --train.lr or raise "
            "--guard.sigma and start again"
        )
    run.heartbeat.enter("load")
    run.saver.wait()
    before = from_main(_before(run, guard.rollback_limit) if run.world.is_main else None)
    blocklist = run.loader.blocklist | ids
    record, _ = run.saver.restore(before)
    if record is None:
        raise Diverged(
            f"{where}, and no earlier checkpoint to return to; lower --train.lr, or save more "
            "often (--train.checkpoint_every)"
        )
    run.loader.load_state_dict(record.manifest["loader"])
    run.loader.block(blocklist)
    saved = record.state.on_ranks(run.world.size)
    guard.roll_back(saved.guard, decided, saved.step)
    saved.config, saved.deepspeed = run.state.config, run.state.deepspeed
    saved.tracking_id = run.tracker.identity or run.state.tracking_id
    run.state = saved
    run.clock = Clock(saved.seconds, run.heartbeat.enter)
    run.window = Window(run.world, saved.window)
    run.reporter.rewind(saved)
    message = f"{where}: back to step {saved.step}, {len(ids)} samples added to the blocklist"
    run.reporter.say(message)
    run.reporter.note("rolled back", saved, reason=message, blocklisted=sorted(ids))


def _before(run: Run, limit: int) -> list[Record]:
    """The checkpoints at or before step `limit`, newest first; newer ones are set aside."""
    records = run.saver.checkpoints.newest_first()[0]
    for record in records:
        if record.step > limit:
            reason = f"the run went back to before step {limit}"
            run.saver.checkpoints.set_aside(record.name, reason)
    return [record for record in records if record.step <= limit]
