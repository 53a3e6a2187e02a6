"""List, verify, prune and roll back the checkpoints of a run, in a folder or in S3.

  checkpoints.py list --at runs/pretrain/checkpoints
  checkpoints.py verify --at s3://bucket/run/checkpoints
  checkpoints.py prune --at runs/pretrain/checkpoints --keep 2 --keep_every 10000 --keep_best
  checkpoints.py rollback --at runs/pretrain/checkpoints --to 5000

`verify` reads every byte and exits with 1 if a committed checkpoint is damaged or there is none.
`prune` also removes what was never committed. `rollback` sets aside the checkpoints after a step,
so that the run resumes from that step. While the run is running, these two are refused with one
line that names it; `list` and `verify` may run beside it, and so may `prune --live`, which leaves
alone what the run is saving.
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
    """Where the checkpoints are, and the options of the commands."""

    at: str = doc("runs/pretrain/checkpoints", "folder or s3:// prefix of the checkpoints")
    keep: int = doc(2, "prune: newest checkpoints to keep, at least one")
    keep_every: int = doc(0, "prune: also keep one every so many steps; 0 for none")
    keep_best: bool = doc(False, "prune: also keep the one with the smallest loss")
    asides: bool = doc(False, "prune: also remove those set aside, and an interrupted save")
    live: bool = doc(False, "prune: beside a running run, to make room for its next save")
    to: int = doc(-1, "rollback: the step to go back to")

    def __post_init__(self) -> None:
        if self.live and self.asides:
            raise ValueError(
                "--live and --asides: this would delete what a run is saving now; give one"
            )


def alone(checkpoints: Checkpoints, command: str) -> AbstractContextManager[object]:
    """The lease of the checkpoints, if there are any; a run that starts meanwhile waits for it."""
    if not checkpoints.contents():
        return contextlib.nullcontext()
    advice = "stop it first (a file STOP in its folder)"
    advice += ", or give --live" if command == "prune" else ""
    about = f"checkpoints.py {command}"
    return hold(checkpoints.store, about, key=RUN_LEASE, advice=advice, brief=True)


def describe(checkpoints: Checkpoints, name: str, aside: bool) -> str:
    """One line on a checkpoint, with the reason if it is invalid or set `aside`."""
    try:
        record = checkpoints.read(name)
    except (DamagedError, RunError) as error:
        return f"{name}  {error}"
    size = sum(entry["bytes"] for entry in record.files.values()) / 2**20
    line = f"{name}  {record.state.samples_seen} samples  {record.manifest['world_size']} ranks  "
    line += f"{size:.1f} MiB" + ("" if math.isinf(record.loss) else f"  loss {record.loss:.4f}")
    if aside:
        reason = checkpoints.store.get(f"{name}/{ASIDE}").decode(errors="replace")
        line += f"  set aside: {reason}"
    return line


def run(command: str, flags: Flags) -> int:
    """Print what the command says; returns the exit code."""
    checkpoints, code = Checkpoints.at(flags.at), 0
    if command in ("list", "verify") and not checkpoints.contents():
        print(f"no checkpoints in {flags.at}")
        return int(command == "verify")
    if command == "list":
        for name, keys in checkpoints.contents().items():
            print(describe(checkpoints, name, ASIDE in keys))
    elif command == "verify":
        for name, keys in checkpoints.contents().items():
            if ASIDE not in keys and MARKER in keys:
                reason = checkpoints.why_invalid(name)
                print(f"{name}  {reason or 'valid'}")
                code |= bool(reason)
    elif command == "prune":
        keep = Keep(flags.keep, flags.keep_every, flags.keep_best)
        with contextlib.nullcontext() if flags.live else alone(checkpoints, command):
            for name in checkpoints.prune(keep, asides=flags.asides):
                print(f"removed {name}")
    else:
        with alone(checkpoints, command):
            for name in checkpoints.roll_back(flags.to):
                print(f"set aside {name}")
    return code


@job("checkpoints", StoreError, ValueError)
def main() -> int:
    """Run the job; returns its exit code."""
    command, flags = sys.argv[1:2], sys.argv[2:]
    if command and command[0] in COMMANDS:
        options = parse_cli(Flags, flags, description=__doc__ or "")
        if command[0] == "rollback" and options.to < 0:
            fail("checkpoints: rollback: --to is missing; give the step to go back to")
        return run(command[0], options)
    if command and command[0].startswith("-"):
        parse_cli(Flags, command, description=__doc__ or "")  # --help, or an unknown flag
    word = "".join(command)
    fail(f"checkpoints: the first argument is {word!r}; choose one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
