"""List, verify, prune and roll back the checkpoints of a run, in a folder or in S3.

  checkpoints.py list --at runs/pretrain/checkpoints
  checkpoints.py verify --at s3://bucket/run/checkpoints
  checkpoints.py prune --at runs/pretrain/checkpoints --keep 2 --keep_every 10000 --keep_best true
  checkpoints.py rollback --at runs/pretrain/checkpoints --to 5000

`verify` reads every byte and exits with 1 if a committed checkpoint is damaged. `prune` also
removes what was never committed. `rollback` sets aside what is newer than a step, so that the run
goes on from there. While a run goes on, both are refused with one line that names it; `list` and
`verify` may run beside it, and so may `prune --live true`, which leaves alone what is being saved.
"""

from mdm.launch.job import job

import contextlib
import math
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass

from mdm.checkpoint.checkpoints import ASIDE, MARKER, Checkpoints, Keep
from mdm.checkpoint.snapshot import DamagedError
from mdm.checkpoint.state import RunError
from mdm.config import doc
from mdm.storage import StoreError
from mdm.storage.lease import hold
from mdm.train.writer import RUN_LEASE
from mdm.utils.command_line import fail, parse_cli

COMMANDS = ("list", "verify", "prune", "rollback")


@dataclass(frozen=True)
class Flags:
    """Where the checkpoints are, and what the command needs besides."""

    at: str = doc("runs/pretrain/checkpoints", "folder or s3:// prefix of the checkpoints")
    keep: int = doc(2, "prune: newest checkpoints kept, at least one")
    keep_every: int = doc(0, "prune: also keep those of every so many steps; 0 for none")
    keep_best: bool = doc(False, "prune: also keep the one with the smallest loss")
    asides: bool = doc(False, "prune: also remove those set aside, and a save that was cut off")
    live: bool = doc(False, "prune: beside a run that goes on, to make room for its next save")
    to: int = doc(-1, "rollback: the step to go back to")

    def __post_init__(self) -> None:
        if self.live and self.asides:
            raise ValueError("--live and --asides: what a run is saving now would go; give one")


def show(checkpoints: Checkpoints) -> int:
    """A line a checkpoint, newest first."""
    for name, keys in checkpoints.contents().items():
        try:
            record = checkpoints.read(name)
        except (DamagedError, RunError) as error:
            print(f"{name}  {error}")
            continue
        state = record.state
        loss = "" if math.isinf(record.loss) else f"  loss {record.loss:.4f}"
        aside = ""
        if ASIDE in keys:
            reason = checkpoints.store.get(f"{name}/{ASIDE}").decode(errors="replace")
            aside = f"  set aside: {reason}"
        print(
            f"{name}  {state.samples_seen} samples  {record.manifest['world_size']} ranks  "
            f"{record.nbytes / 2**20:.1f} MiB{loss}{aside}"
        )
    return 0


def verify(checkpoints: Checkpoints) -> int:
    """Read every byte of all that count; 1 if any is damaged."""
    damaged = 0
    for name, keys in checkpoints.contents().items():
        if ASIDE in keys or MARKER not in keys:
            continue
        reason = checkpoints.why_invalid(name)
        damaged += bool(reason)
        print(f"{name}  {reason or 'valid'}")
    return int(damaged > 0)


def prune(checkpoints: Checkpoints, flags: Flags) -> int:
    """Remove what the flags do not ask for."""
    keep = Keep(flags.keep, flags.keep_every, flags.keep_best)
    for name in checkpoints.prune(keep, asides=flags.asides):
        print(f"removed {name}")
    return 0


def rollback(checkpoints: Checkpoints, step: int) -> int:
    """Set aside what is newer than `step`; ValueError if nothing would be left to go on from."""
    records, _ = checkpoints.newest_first()
    if step not in (steps := [record.step for record in records]):
        raise ValueError(f"--to is {step}; there are checkpoints of steps {steps}")
    for record in records:
        if record.step > step:
            checkpoints.set_aside(record.name, f"rolled back to step {step}")
            print(f"set aside {record.name}")
    return 0


def alone(checkpoints: Checkpoints, command: str) -> AbstractContextManager[object]:
    """The lease of the checkpoints, if there are any; a run that starts meanwhile waits for it."""
    if not checkpoints.contents():
        return contextlib.nullcontext()
    advice = "have it end first (a file STOP in its folder)"
    advice += ", or give --live true" if command == "prune" else ""
    about = f"checkpoints.py {command}"
    return hold(checkpoints.store, about, key=RUN_LEASE, advice=advice, brief=True)


@job("checkpoints", StoreError, ValueError)
def main() -> int:
    """Run the job; returns its exit code."""
    command, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command.startswith("-"):
        parse_cli(Flags, description=__doc__ or "")  # --help, or a flag that is wrong
    if command not in COMMANDS:
        fail(f"checkpoints: the first argument is {command!r}; choose one of {', '.join(COMMANDS)}")
    flags = parse_cli(Flags, rest, description=__doc__ or "")
    checkpoints = Checkpoints.at(flags.at)
    if command == "list":
        return show(checkpoints)
    if command == "verify":
        return verify(checkpoints)
    beside = command == "prune" and flags.live
    with contextlib.nullcontext() if beside else alone(checkpoints, command):
        if command == "prune":
            return prune(checkpoints, flags)
        return rollback(checkpoints, flags.to)


if __name__ == "__main__":
    sys.exit(main())
