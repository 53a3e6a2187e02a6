"""Pretrain: `deepspeed --num_accelerators 2 pipelines/pretrain.py --preset demo`.

One rank works too: `python pipelines/pretrain.py --preset demo`. The same command resumes from the
newest valid checkpoint of `run_dir`; `pipelines/supervise.py` restarts it automatically. SIGTERM,
SIGUSR1, SIGUSR2, Ctrl-C and a file STOP in `run_dir` make it save and exit; Ctrl-C before the first
step, or a second Ctrl-C, ends it at once.

`--replay_step N` replays a step that the guard skipped, in one process, and names the sample that
caused it.

Only one job may write to a run: a second job on its folder or its checkpoints exits with code 2 and
names the first.

Exit codes: 0 done, 1 failed (also a failed preflight check), 2 a mistake that one line explains,
3 stopped by the file STOP, 70 a hang, 75 stopped by a signal after saving, 130 ended at once by
Ctrl-C. (Launchers have their own codes: a supervisor reads what the ranks themselves report.)
"""

from mdm.launch.job import job

import contextlib
import functools
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm.config import Config, config_of, doc
from mdm.launch.rank import run_rank
from mdm.loss import Loss
from mdm.planning.preflight import preflight, table
from mdm.presets import PRESETS
from mdm.train import replay_box
from mdm.train.engine import device_of_rank, start_ranks
from mdm.train.pretraining import pretrain
from mdm.train.profiling import parse_steps
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import check_fields, one_of
from mdm.utils.ranks import World


@dataclass(frozen=True)
class Flags(Config):
    """A run's configuration and how to start it."""

    preset: str = doc("", f"required, one of {', '.join(PRESETS)}: what the other flags change")
    resume: str = doc(
        "auto", "continue from the newest valid checkpoint, or start over", one_of("auto", "none")
    )
    preflight: bool = doc(
        False, "check memory, storage, disk, versions, network, speed; train nothing"
    )
    profile: str = doc("", "steps to trace into run_dir/profile: 10:13 for 10, 11 and 12")
    memory_history: bool = doc(False, "record CUDA's allocations, for a snapshot should they fail")
    tracking: bool = doc(True, "log to MLflow")
    replay_step: int = doc(-1, "replay this skipped step sample by sample; train nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        parse_steps(self.profile)


def run(world: World) -> int:
    """One rank's part of the job; returns its exit code."""
    with contextlib.nullcontext() if world.is_main else contextlib.redirect_stderr(io.StringIO()):
        flags = parse_cli(Flags, description=__doc__ or "", presets=PRESETS)
    config = config_of(flags)
    if flags.replay_step >= 0:
        folder, report = replay_box.find_box(Path(config.run_dir), flags.replay_step)
        print(replay_box.describe(report, *replay_box.replay(folder, Loss)))
        return 0
    world = start_ranks(config.train.threads)
    if flags.preflight:
        checks = preflight(config, world, device_of_rank())
        if world.is_main:
            print(table(checks))
        return 0 if all(check.passed for check in checks) else 1
    if flags.memory_history and torch.cuda.is_available():  # not run: no GPU was available
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    draw = None
    if config.train.images:
        from mdm.report.drawing import draw_samples  # takes seconds

        draw = functools.partial(draw_samples, n=config.train.images)
    return pretrain(
        config,
        world,
        resume=flags.resume,
        track=flags.tracking,
        profiled=parse_steps(flags.profile),
        draw=draw,
    )


@job("pretrain")
def main() -> int:
    """Run the job; returns its exit code."""
    world = World.from_env()
    return run_rank("pretrain", world, functools.partial(run, world))


if __name__ == "__main__":
    sys.exit(main())
