"""The interface of a drill: what it is given, and what it reports.

To add a drill, write a function that takes a `Setting` and yields a `Row` for each fault as soon as
the fault is over, and add the function to `DRILLS` in `__main__.py`. A drill injects real faults
into real jobs, counts them, and compares the result with an undisturbed run. It fails if it raises.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """The input of a drill: an empty folder of its own, a number of rounds, and a seed."""

    folder: Path
    rounds: int  # number of kills, in drills that kill at random times
    seed: int

    def random(self, name: str) -> random.Random:
        """A random generator for one part of a drill."""
        return random.Random(f"{self.seed} {name}")


@dataclass(frozen=True)
class Row:
    """One fault of one drill, a line of the table."""

    fault: str
    injected: int
    survived: int  # faults after which the job finished, at once or after a clear error and a rerun
    lost: int  # samples, steps or committed objects that are gone for good; must be 0
    bitwise_equal: bool  # whether the result equals that of an undisturbed run
    seconds_lost: float  # in total, beyond the time of an undisturbed run
    note: str = ""


Drill = Callable[[Setting], Iterator[Row]]
