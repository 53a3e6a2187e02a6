"""What a run leaves behind: exports, images drawn with them, the done marker, its MLflow run."""

import contextlib
from pathlib import Path

import torch

from mdm.checkpoint.checkpoints import Checkpoints, Record
from mdm.checkpoint.export import export_checkpoint, missing_files, write_export
from mdm.checkpoint.state import RunError, TrainState, flatten
from mdm.config import Config
from mdm.data.provenance import Provenance
from mdm.storage import StoreError, join
from mdm.train.run import Run
from mdm.train.saver import on_main
from mdm.utils import files
from mdm.utils.exit_codes import GAVE_UP
from mdm.utils.progress import EVENTS, METRICS, TRACKING, Progress, adopt_old_journal, unsent_bytes
from mdm.utils.ranks import World
from mdm.utils.saved_config import fingerprint, to_dict
from mdm.utils.tracking import MlflowTracker, NullTracker

DONE = "done.json"
EXPORT, SNAPSHOTS, SAMPLES = "export", "snapshots", "samples"  # folders
_DONE: files.Shape = {
    "step": int,
    "samples_seen": int,
    "wall_seconds": float,
    "goodput": float,
    "samples_per_second": float,
}


def export(folder: Path, run: Run, needed: bool = True) -> None:
    """Write the averaged weights for generation; all ranks must call.

    If an export is not `needed`, a failure to write it is only a warning.
    """
    weights = {kind: run.engine.shards.gather(shadow) for kind, shadow in run.ema.shadows.items()}
    if run.world.is_main:
        try:
            provenance = Provenance.of(run.loader.state_dict())
            write_export(folder, run.config, run.state, weights, run.tokenizer, provenance)
        except (OSError, StoreError) as error:
            if needed:
                raise
            run.reporter.say(f"warning: {folder} is not written: {error}")
    torch.distributed.barrier()


def show(folder: Path, run: Run) -> None:
    """Draw images with the export `folder` and track them; all ranks must call.

    Rank 0 draws on its CPU while the others wait. The random state of the training stays as it
    is, and a failure is only a warning.
    """
    if run.draw is None:
        return
    if run.world.is_main:
        name = f"step-{run.state.step:08d}"
        png = f"{SAMPLES}/{name}.png"
        try:
            with torch.random.fork_rng(devices=[]):
                content = run.draw(folder, run.dir / png)
        except (OSError, ValueError, RuntimeError) as error:
            run.reporter.say(f"warning: no images of {folder}: {error}")
        else:
            link = {"weights": str(folder.absolute()), "step": run.state.step}
            artifacts = {png: png, f"{SAMPLES}/{name}.json": link | content}
            run.reporter.note("drew", run.state, artifacts=artifacts)
    torch.distributed.barrier()


def mark_done(run: Run) -> None:
    """Write `done.json`, which marks the run as finished; all ranks must call."""
    run.clock.tick("other")
    run.state.seconds = dict(run.clock.seconds)
    totals = run.reporter.totals(run.state, run.loader.wait_seconds)
    if run.world.is_main:
        try:
            files.write_json(run.dir / DONE, totals)
        except OSError as error:
            raise StoreError(f"cannot write {run.dir / DONE}: {error.strerror}") from error


def done_before(
    config: Config, checkpoints: Checkpoints, newest: Record, world: World, track: bool
) -> bool:
    """Whether the run ended with `newest`, its last checkpoint; all ranks must call.

    If so, a missing export is made from the checkpoint, and MLflow receives what waits for it.
    Raises RunError if the export cannot be written.
    """
    is_finished, failure = on_main(lambda: _complete_export(config, checkpoints, newest), world)
    if failure:
        refusal = RunError(f"the export cannot be made again: {failure}")
        refusal.code = GAVE_UP
        raise refusal
    if world.is_main and is_finished and track:
        deliver(config, newest.state)
    return bool(is_finished)


def _complete_export(config: Config, checkpoints: Checkpoints, newest: Record) -> bool:
    """Export again what is missing of a finished run; False if the run is not finished."""
    run_dir = Path(config.run_dir)
    if files.read_json(run_dir / DONE, _DONE).get("step") != newest.step:
        return False
    folder = run_dir / EXPORT
    if missing := missing_files(folder, config, newest.averages):
        try:
            uri = join(checkpoints.store.uri, newest.name)
            export_checkpoint(uri, folder, newest.averages, config=config)
        except RunError as error:  # it is damaged: the run continues from an earlier one
            files.warn_once(f"{folder} lacks {', '.join(missing)}, and {error}")
            return False
        files.warn_once(f"{folder} lacked {', '.join(missing)}: made again from {newest.name}")
    return True


def forget_former(run_dir: Path, track: bool) -> None:
    """Remove what would make the former run in this folder be taken for the new one.

    With `track`, the new run's tracker closes the former MLflow run.
    """
    adopt_old_journal(run_dir)
    former = Progress.read(run_dir)
    for name in (DONE, TRACKING):
        files.set_folder_aside(run_dir / name)
        (run_dir / name).unlink(missing_ok=True)
    if track and (former.run_id or former.key):
        with contextlib.suppress(OSError):
            Progress(former=[*former.former, [former.run_id, former.key]]).write(run_dir)


def start_tracking(config: Config, state: TrainState, wanted: bool) -> MlflowTracker | NullTracker:
    """Track all attempts at a run, also those killed before a checkpoint, as one MLflow run.

    Its id is in the checkpoint, and in `tracking.json` as soon as it is known.
    """
    if not wanted:
        return NullTracker()
    run_dir = Path(config.run_dir)
    adopt_old_journal(run_dir)
    former = Progress.read(run_dir)
    if not state.step and former.config not in ("", fingerprint(config)):  # it never saved
        forget_former(run_dir, track=True)
    return _tracker(config, state)


def _tracker(config: Config, state: TrainState) -> MlflowTracker:
    run_dir = Path(config.run_dir)
    return MlflowTracker(
        run_dir,
        config.experiment,
        run_dir.name,
        params=flatten(to_dict(config)) | {"world_size": state.world_size},
        identity=state.tracking_id or "",
        config=fingerprint(config),
    )


def deliver(config: Config, state: TrainState) -> None:
    """Send to MLflow what a finished run could not, because the server was down."""
    run_dir = Path(config.run_dir)
    adopt_old_journal(run_dir)
    if not (run_dir / TRACKING).exists():  # it was not tracked
        return
    for name in (METRICS, EVENTS):  # reports damaged lines
        files.read_lines(run_dir / name, repair=True)
    progress = Progress.read(run_dir)
    if progress.status != "FINISHED" or unsent_bytes(run_dir, progress):
        _tracker(config, state).finish("FINISHED", timeout=300.0)
