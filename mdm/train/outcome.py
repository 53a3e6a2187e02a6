"""What a run leaves behind: exports, images that they draw, the done marker, its MLflow run."""

import contextlib
import json
import shutil
from pathlib import Path

import torch

from mdm.checkpoint.checkpoints import Checkpoints, Record
from mdm.checkpoint.export import export_checkpoint
from mdm.checkpoint.exported import Training, missing_files, write_export
from mdm.checkpoint.state import RunError, TrainState, flatten
from mdm.config import Config, fingerprint, to_dict
from mdm.data.provenance import Provenance
from mdm.storage import StoreError, join
from mdm.train.run import Run
from mdm.utils import files
from mdm.utils.exit_codes import GAVE_UP
from mdm.utils.journal import Journal
from mdm.utils.ranks import World, from_main
from mdm.utils.tracking import MlflowTracker, NullTracker, Tracker, read_key

DONE, TRACKING, JOURNAL = "done.json", "tracking.json", "tracking"
EXPORT, SNAPSHOTS, SAMPLES = "export", "snapshots", "samples"  # folders
_DONE: files.Shape = {
    **{"step": int, "samples_seen": int},
    **{"wall_seconds": float, "goodput": float, "samples_per_second": float},
}
_TRACKING: files.Shape = {"run_id": str, "config": str}


def export(folder: Path, run: Run, needed: bool = True) -> None:
    """Write the averaged weights for generation; all ranks must call.

    One that is not `needed` and cannot be written is a warning.
    """
    weights = {kind: run.engine.gather(shadow) for kind, shadow in run.ema.shadows.items()}
    if run.world.is_main:
        state = run.state
        training = Training(state.step, state.samples_seen, state.loss)
        try:
            provenance = Provenance.of(run.loader.state_dict())
            write_export(folder, run.config, training, weights, run.tokenizer, provenance)
        except (OSError, StoreError) as error:
            if needed:
                raise
            run.reporter.say(f"warning: {folder} is not written: {error}")
    torch.distributed.barrier()


def show(folder: Path, run: Run) -> None:
    """Have images drawn with the export `folder`, and tracked; all ranks must call.

    Rank 0 draws on its CPU while the others wait. No random numbers of the training are used up,
    and what cannot be drawn is a warning.
    """
    if run.draw is None:
        return
    if run.world.is_main:
        name = f"step-{run.state.step:08d}"
        path = run.dir / SAMPLES / f"{name}.png"
        try:
            with torch.random.fork_rng(devices=[]):
                drawn = run.draw(folder, path)
        except (OSError, ValueError, RuntimeError) as error:
            run.reporter.say(f"warning: no images of {folder}: {error}")
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
        try:
            files.write_json(run.dir / DONE, totals)
        except OSError as error:
            raise StoreError(f"cannot write {run.dir / DONE}: {error.strerror}") from error
        run.tracker.log_artifact(run.dir / DONE)


def done_before(
    config: Config, checkpoints: Checkpoints, newest: Record, world: World, track: bool
) -> bool:
    """Whether the run ended with `newest`, its last checkpoint; all ranks must call.

    If so, what it leaves behind is completed: an export that is gone is made anew from the
    checkpoint, and MLflow gets what waits for it.

    Raises:
        RunError: the export cannot be written.
    """
    finished, failure = False, ""
    if world.is_main:
        try:
            finished = _export_again(config, checkpoints, newest)
        except (OSError, StoreError) as error:
            failure = f"the export cannot be made anew: {error}"
    finished, failure = from_main((finished, failure))
    if world.is_main and finished and track:
        deliver(config, newest.state)
    if failure:
        refusal = RunError(failure)
        refusal.code = GAVE_UP
        raise refusal
    return bool(finished)


def _export_again(config: Config, checkpoints: Checkpoints, newest: Record) -> bool:
    run_dir = Path(config.run_dir)
    if files.read_json(run_dir / DONE, _DONE).get("step") != newest.step:
        return False
    folder = run_dir / EXPORT
    if missing := missing_files(folder, config, newest.averages):
        try:
            uri = join(checkpoints.store.uri, newest.name)
            export_checkpoint(uri, folder, newest.averages, config=config)
        except RunError as error:  # the checkpoint is damaged: the run goes on from one before
            files.warn_once(f"{folder} lacks {', '.join(missing)}, and {error}")
            return False
        files.warn_once(f"{folder} lacked {', '.join(missing)}: made anew from {newest.name}")
    return True


def forget_former(run_dir: Path, track: bool) -> None:
    """Have nothing of an earlier run in this folder taken for the new one's.

    With `track`, its MLflow run is closed by the new one's tracker.
    """
    files.set_folder_aside(run_dir / DONE)
    (run_dir / DONE).unlink(missing_ok=True)
    _forget_tracking(run_dir, track)


def _forget_tracking(run_dir: Path, track: bool) -> None:
    former = files.read_json(run_dir / TRACKING, _TRACKING).get("run_id", "")
    key = read_key(run_dir / JOURNAL)
    files.set_folder_aside(run_dir / TRACKING)
    (run_dir / TRACKING).unlink(missing_ok=True)
    shutil.rmtree(run_dir / JOURNAL, ignore_errors=True)
    if track and (former or key):
        with contextlib.suppress(OSError):
            journal = Journal(run_dir / JOURNAL)
            journal.append({"kind": "former", "run_id": former, "key": key})
            journal.close()


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
    former = files.read_json(note, _TRACKING)
    if former and not state.step and former["config"] != key:  # it never came to a checkpoint
        _forget_tracking(run_dir, track=True)
        former = {}

    def remember(started: str) -> None:
        files.write_json(note, {"run_id": started, "config": key})

    return MlflowTracker(
        *(config.experiment, run_dir.name),
        run_id=former.get("run_id") or state.tracking_id,
        on_start=remember,
        journal=run_dir / JOURNAL,
    )


def deliver(config: Config, state: TrainState) -> None:
    """Bring to MLflow what a finished run could not, its server being away."""
    waiting = Path(config.run_dir) / JOURNAL
    if not waiting.is_dir():
        return
    try:
        journal = Journal(waiting)
    except OSError as error:
        files.warn_once(f"{waiting} cannot be read: {error}")
        return
    left = len(journal)
    journal.close()
    if left:
        _tracker(config, state).finish("FINISHED", timeout=300.0)
