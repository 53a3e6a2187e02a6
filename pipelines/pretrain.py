"""Pretrain: `deepspeed --num_accelerators 2 pipelines/pretrain.py --preset demo`.

One rank works too: `python pipelines/pretrain.py --preset demo`. Run again, it goes on from the
newest valid checkpoint of `run_dir`; `pipelines/supervise.py` does that by itself. SIGTERM,
SIGUSR1, SIGUSR2, Ctrl-C and a file STOP in `run_dir` make it save and end; Ctrl-C before the first
step, or a second one, ends it at once.

`--replay_step N` replays a step that the guard skipped, alone and in one process, and says which
sample did it.

One job at a time writes to a run: a second one on its folder or its checkpoints ends with exit code
2 and names the first.

Exit codes: 0 done, 1 failed (a preflight check too), 2 a mistake that one line explains, 3 ended by
the file STOP, 70 a hang, 75 told to stop, and saved, 130 ended at once by Ctrl-C. (Launchers have
codes of their own: a supervisor reads what the ranks themselves say.)
"""

from mdm.launch.job import job, told

import contextlib
import functools
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm.checkpoint.state import RunError
from mdm.config import Config, doc, fields_of
from mdm.data.loader import Loader, ResumeError, build_loader
from mdm.data.provenance import check_fit
from mdm.loss import Loss
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Block, Trunk
from mdm.planning.preflight import preflight, table
from mdm.presets import PRESETS
from mdm.storage import StoreError
from mdm.train import heartbeat
from mdm.train import replay_box as blackbox
from mdm.train.engine import device_of_rank, start_ranks, stop_ranks
from mdm.train.loop import train
from mdm.train.profiling import explain_out_of_memory, parse_steps, record_memory
from mdm.train.run import Draw
from mdm.utils import exit_codes
from mdm.utils.command_line import parse_cli
from mdm.utils.ranks import World


@dataclass(frozen=True)
class Flags(Config):
    """A run's configuration and how to begin it."""

    resume: str = doc("auto", "auto: continue run_dir's newest valid checkpoint; none: start over")
    preflight: bool = doc(False, "check storage, disk, versions, network and speed; train nothing")
    profile: str = doc("", "steps to trace into run_dir/profile: 10:13 for 10, 11 and 12")
    memory_history: bool = doc(False, "record CUDA's allocations, for a snapshot should they fail")
    tracking: bool = doc(True, "log to MLflow; false: nothing is written for it")
    replay_step: int = doc(
        -1, "replay this skipped step alone, sample by sample, and train nothing"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_steps(self.profile)
        if self.resume not in ("auto", "none"):
            raise ValueError(f"--resume is {self.resume!r}; choose auto or none")


def make_loader(config: Config, world: World) -> Loader:
    """The run's loader; data that is missing or does not fit is the user's to mend."""
    try:
        loader = build_loader(config, world)
        # Once a node: any of them may come to write the exports, which hold the tokenizer.
        if world.local_rank == 0:
            check_fit(loader.mixture, config)
        return loader
    except (ValueError, StoreError) as error:
        raise RunError(str(error)) from error


def check_first(config: Config, world: World) -> int:
    """Print the table of checks; returns the exit code."""
    checks = preflight(config, world, device_of_rank())
    if world.is_main:
        print(table(checks))
    return 0 if all(check.passed for check in checks) else 1


def replay(config: Config, step: int) -> int:
    """Print what a skipped step does with each of its samples alone."""
    folder, report = blackbox.find_box(Path(config.run_dir), step)
    whole, played = blackbox.replay(folder, Loss)
    print(blackbox.describe(report, whole, played))
    return exit_codes.DONE


def drawing(images: int) -> Draw | None:
    """What draws so many images of each kind with a snapshot; None for none."""
    if not images:
        return None
    # Imported here: what generates takes seconds to import.
    from mdm.report.drawing import draw_samples

    return functools.partial(draw_samples, n=images)


def run(flags: Flags, config: Config, world: World) -> int:
    """Train, or only check; returns the exit code."""
    if flags.preflight:
        return check_first(config, world)
    if flags.memory_history:
        record_memory()
    gathered = {"block": (Block, AttentionBlock), "trunk": (Trunk,)}[config.train.gather]
    return train(
        config,
        world,
        Loss,
        make_loader,
        resume=flags.resume,
        leaf_classes=gathered,
        track=flags.tracking,
        profiled=parse_steps(flags.profile),
        draw=drawing(config.train.images),
    )


@job("pretrain")
def main() -> int:
    """Run the job; returns its exit code."""
    world = World.from_env()
    presets = {name: Flags(**fields_of(preset)) for name, preset in PRESETS.items()}  # type: ignore[arg-type]
    voice = contextlib.nullcontext() if world.is_main else contextlib.redirect_stderr(io.StringIO())
    try:
        with voice:
            flags = parse_cli(Flags, description=__doc__ or "", presets=presets)
        config = Config(**fields_of(flags))  # type: ignore[arg-type]
        if flags.replay_step >= 0:
            return replay(config, flags.replay_step)
        world = start_ranks(config.train.threads)
        code = run(flags, config, world)
        heartbeat.report_end(code)
        return code
    except torch.OutOfMemoryError as error:  # of this rank alone
        said = explain_out_of_memory(error, config, world)
        heartbeat.report_end(exit_codes.MISTAKE, said)
        print(f"pretrain: rank {world.rank}: {said}", file=sys.stderr)
        return exit_codes.MISTAKE
    except (StoreError, OSError) as error:  # in the middle of the run, and of this rank alone
        heartbeat.report_end(exit_codes.GAVE_UP, told(error))
        print(f"pretrain: rank {world.rank}: {told(error)}", file=sys.stderr)
        return exit_codes.GAVE_UP
    except (RunError, ResumeError, SystemExit) as error:  # the same on every rank
        if isinstance(error, SystemExit) and not error.code:  # --help
            raise
        said = "" if isinstance(error, SystemExit) else str(error)
        code = int(getattr(error, "code", exit_codes.MISTAKE))
        heartbeat.report_end(code, said)
        if not world.is_main:
            time.sleep(3)  # once a rank is gone, the launcher ends the others: let rank 0 speak
        elif said:
            print(f"pretrain: {said}", file=sys.stderr)
        return code
    except Exception as error:
        heartbeat.report_end(exit_codes.GAVE_UP, f"{type(error).__name__}: {error}")
        raise
    finally:
        stop_ranks()


if __name__ == "__main__":
    sys.exit(main())
