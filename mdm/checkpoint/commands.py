"""What people ask of a run's checkpoints: a list, a check of every byte, an earlier step."""

import math
from collections.abc import Iterator

from mdm.checkpoint.checkpoints import ASIDE, MARKER, Checkpoints
from mdm.checkpoint.snapshot import DamagedError
from mdm.checkpoint.state import RunError


def describe_all(checkpoints: Checkpoints) -> Iterator[str]:
    """One line per checkpoint, newest first."""
    for name, keys in checkpoints.contents().items():
        try:
            record = checkpoints.read(name)
        except (DamagedError, RunError) as error:
            yield f"{name}  {error}"
            continue
        state = record.state
        loss = "" if math.isinf(record.loss) else f"  loss {record.loss:.4f}"
        aside = ""
        if ASIDE in keys:
            reason = checkpoints.store.get(f"{name}/{ASIDE}").decode(errors="replace")
            aside = f"  set aside: {reason}"
        yield (
            f"{name}  {state.samples_seen} samples  {record.manifest['world_size']} ranks  "
            f"{record.nbytes / 2**20:.1f} MiB{loss}{aside}"
        )


def find_damage(checkpoints: Checkpoints) -> Iterator[tuple[str, str]]:
    """Read every byte: each committed checkpoint, newest first, and why it is invalid, or ""."""
    for name, keys in checkpoints.contents().items():
        if ASIDE not in keys and MARKER in keys:
            yield name, checkpoints.why_invalid(name)


def roll_back(checkpoints: Checkpoints, step: int) -> Iterator[str]:
    """Set aside the checkpoints after `step`, and yield their names.

    Raises:
        ValueError: There is no valid checkpoint of `step`, from which the run would resume.
    """
    records, _ = checkpoints.newest_first()
    if step not in (steps := [record.step for record in records]):
        raise ValueError(f"--to is {step}; there are checkpoints of steps {steps}")
    for record in records:
        if record.step > step:
            checkpoints.set_aside(record.name, f"rolled back to step {step}")
            yield record.name
