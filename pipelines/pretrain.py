"""Pretrain: `deepspeed --num_accelerators 2 pipelines/pretrain.py --preset demo`.

One rank works too: `python pipelines/pretrain.py --preset demo`. Run again, it goes on from the
newest valid checkpoint of `run_dir`. Exit codes: 0 done, 2 a mistake that one line explains,
75 stopped by SIGTERM after saving.
"""

import contextlib
import dataclasses
import io
import sys
import time
from dataclasses import dataclass

from mdm.config import Config, doc, fail, parse_cli
from mdm.data.loader import Loader, ResumeError, build_loader
from mdm.data.storage import StoreError
from mdm.dist import World
from mdm.model.network import Block, Trunk
from mdm.model.transformer import AttentionBlock
from mdm.objective import Objective
from mdm.presets import PRESETS
from mdm.train.engine import start_ranks, stop_ranks
from mdm.train.loop import train
from mdm.train.state import RunError


@dataclass(frozen=True)
class Flags(Config):
    """A run's configuration and how to begin it."""

    resume: str = doc("auto", "auto: continue run_dir's newest valid checkpoint; none: start over")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume not in ("auto", "none"):
            raise ValueError(f"--resume is {self.resume!r}; choose auto or none")


def fields_of(config: Config) -> dict[str, object]:
    """The fields that a run's configuration has, without this job's own flag."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}


def make_loader(config: Config, world: World) -> Loader:
    """The run's loader; data that is missing or does not fit is the user's to mend."""
    try:
        return build_loader(config, world)
    except (ValueError, StoreError) as error:
        raise RunError(str(error)) from error


def main() -> int:
    """Run the job; returns its exit code."""
    world = World.from_env()
    presets = {name: Flags(**fields_of(preset)) for name, preset in PRESETS.items()}  # type: ignore[arg-type]
    voice = contextlib.nullcontext() if world.is_main else contextlib.redirect_stderr(io.StringIO())
    try:
        with voice:
            flags = parse_cli(Flags, description=__doc__ or "", presets=presets)
        config = Config(**fields_of(flags))  # type: ignore[arg-type]
        world = start_ranks(config.train.threads)
        gathered = {"block": (Block, AttentionBlock), "trunk": (Trunk,)}[config.train.gather]
        return train(
            config, world, Objective, make_loader, resume=flags.resume, leaf_classes=gathered
        )
    except StoreError as error:  # in the middle of the run, and of this rank alone
        fail(f"pretrain: rank {world.rank}: {error}")
    except (RunError, ResumeError, SystemExit) as error:  # the same on every rank
        if not world.is_main:
            time.sleep(3)  # once a rank is gone, the launcher ends the others: let rank 0 speak
            return 2
        if isinstance(error, SystemExit):
            raise
        fail(f"pretrain: {error}")
    finally:
        stop_ranks()


if __name__ == "__main__":
    sys.exit(main())
