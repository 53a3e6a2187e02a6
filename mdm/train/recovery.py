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
    own = {name: float(v.detach()) for name, v in terms._asdict().items() if v.dim() == 0}
    shares = gather_to_all((own, batch.nonfinite(), batch.to("cpu")))
    broken = sorted(i for _, bad, _ in shares for i in bad)
    weights = None
    if run.config.guard.black_boxes and not guard.history.recent:  # the first of its trouble
        weights = run.engine.gather(run.engine.fp32_partitions())
    if run.world.is_main:
        said = _blame(step, reason, shares)
        report = {
            "reason": reason,
            "blame": said,
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
            said += f"; replay box: {folder}"
        except OSError as error:  # a full disk costs the box, not the run
            said += f"; no replay box: {error.strerror}"
        run.reporter.say(said)
        run.reporter.note("skipped", run.state, reason=said)
    if broken:  # they are nobody's doubt: whatever the weights, nothing finite comes of them
        run.loader.block(broken)
    guard.skip(step, known=bool(broken))


def _blame(step: int, reason: str, shares: list[tuple[dict[str, float], Any, Batch]]) -> str:
    """One line: what happened, and which samples of which ranks.

    Those whose latents are not finite, if there are any: the other samples of the global batch meet
    them as candidates and in its statistics. Else the ranks whose loss is not finite.
    """
    said = []
    for rank, (terms, bad, part) in enumerate(shares):
        if bad:
            said.append(f"rank {rank}: latents that are not finite of {', '.join(bad)}")
        elif not math.isfinite(terms["total"]) and not any(b for _, b, _ in shares):
            values = ", ".join(f"{k} {v:.4g}" for k, v in terms.items())
            said.append(f"rank {rank}: {values} from {', '.join(part.ids)}")
    return "; ".join([f"step {step} is skipped: {reason}", *said])


def roll_back(run: Run) -> None:
    """Return to a checkpoint from before the trouble, and add its samples to the blocklist.

    All ranks must call. Raises Diverged when that has not helped, or there is nothing to return to.
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
    found, _ = run.saver.restore(before)
    if found is None:
        raise Diverged(
            f"{where}, and no checkpoint from before to go back to; lower --train.lr, or save more "
            "often (--train.checkpoint_every)"
        )
    run.loader.load_state_dict(found.manifest["loader"])
    run.loader.block(blocklist)
    saved = found.state.on_ranks(run.world.size)
    config, deepspeed = run.state.config, run.state.deepspeed
    tracking_id = run.tracker.identity or run.state.tracking_id
    guard.roll_back(saved.guard, decided, saved.step)
    run.state = saved
    run.state.config, run.state.deepspeed = config, deepspeed
    run.state.tracking_id = tracking_id
    run.clock = Clock(saved.seconds, run.heartbeat.enter)
    run.window = Window(run.world, saved.window)
    run.reporter.rewind(saved)
    said = f"{where}: back to step {saved.step}, {len(ids)} samples added to the blocklist"
    run.reporter.say(said)
    run.reporter.note("rolled back", saved, reason=said, blocklisted=sorted(ids))


def _before(run: Run, limit: int) -> list[Record]:
    """The checkpoints at or before step `limit`, newest first; newer ones are set aside."""
    checkpoints, found = run.saver.checkpoints, []
    for record in checkpoints.newest_first()[0]:
        if record.step <= limit:
            found.append(record)
        else:
            checkpoints.set_aside(record.name, f"the run went back to before step {limit}")
    return found
