"""What a run leaves behind: exports, pictures that they draw, the done marker, its MLflow run."""

import json
import shutil
from pathlib import Path

import torch

from mdm.config import Config, fingerprint, to_dict
from mdm.data.storage import StoreError
from mdm.exported import Training, write_export
from mdm.journal import Journal
from mdm.tracking import MlflowTracker, NullTracker, Tracker
from mdm.train.checkpoint import write_synced
from mdm.train.run import Run
from mdm.train.state import TrainState, flatten

DONE, TRACKING, JOURNAL = "done.json", "tracking.json", "tracking"


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


def show(folder: Path, run: Run) -> None:
    """Have pictures drawn with the export `folder`, and tracked; all ranks must call.

    Rank 0 draws on its CPU while the others wait. No random numbers of the training are used up,
    and what cannot be drawn is a warning.
    """
    if run.draw is None:
        return
    if run.world.is_main:
        name = f"step-{run.state.step:08d}"
        path = run.dir / "samples" / f"{name}.png"
        try:
            with torch.random.fork_rng(devices=[]):
                drawn = run.draw(folder, path)
        except (OSError, ValueError, RuntimeError) as error:
            run.reporter.say(f"warning: no pictures of {folder}: {error}")
        else:
            link = {"weights": str(folder.absolute()), "step": run.state.step}
            run.tracker.log_artifact(path, "samples")
            run.tracker.log_text(json.dumps(link | drawn, indent=1), f"samples/{name}.json")
    torch.distributed.barrier()


def mark_done(run: Run) -> None:
    """Write the totals that say that all is done; all ranks must call."""
    run.clock.tick("other")
    run.state.seconds = dict(run.clock.seconds)
    totals = run.reporter.totals(run.state, run.loader.wait_seconds)
    if run.world.is_main:
        write_synced(run.dir / DONE, json.dumps(totals, indent=1).encode())
        run.tracker.log_artifact(run.dir / DONE)


def forget_former(run_dir: Path) -> None:
    """Have nothing of an earlier run in this folder taken for the new one's."""
    for name in (DONE, TRACKING):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / JOURNAL, ignore_errors=True)


def start_tracking(config: Config, state: TrainState, wanted: bool) -> Tracker:
    """One MLflow run a job across its attempts, also of those killed before their first checkpoint.

    The id stands in the checkpoint, and beside it as soon as it is known.
    """
    if not wanted:
        return NullTracker()
    tracker = _tracker(config, state)
    tracker.log_params(flatten(to_dict(config)) | {"world_size": state.world_size})
    return tracker


def _tracker(config: Config, state: TrainState) -> MlflowTracker:
    run_dir = Path(config.run_dir)
    key, note = fingerprint(config), run_dir / TRACKING
    run_id = state.tracking_id
    if run_id is None and note.exists():
        former = json.loads(note.read_text(encoding="utf-8"))
        run_id = former["run_id"] if former["config"] == key else None

    def remember(started: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_synced(note, json.dumps({"run_id": started, "config": key}).encode())

    return MlflowTracker(
        *(config.experiment, run_dir.name),
        run_id=run_id,
        on_start=remember,
        journal=run_dir / JOURNAL,
    )


def deliver(config: Config, state: TrainState) -> None:
    """Bring to MLflow what a finished run could not, its server being away."""
    waiting = Path(config.run_dir) / JOURNAL
    if not waiting.is_dir():
        return
    journal = Journal(waiting)
    left = len(journal)
    journal.close()
    if left:
        _tracker(config, state).finish("FINISHED", timeout=300.0)
