"""What a drill is, and what it hands to the report.

To add one: write a function that takes a `Setting` and yields a `Row` for each fault, as soon as it
is over, and put its name into `DRILLS` of `__main__.py`. A drill injects real faults into the real
jobs, says how often, and compares what comes out with an undisturbed run; what it raises fails it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """What every drill is given: an empty folder of its own, how often, and a seed."""

    folder: Path
    rounds: int  # random kills of a drill that kills at random times
    seed: int

    def random(self, name: str) -> random.Random:
        """Random numbers of one part of a drill."""
        return random.Random(f"{self.seed} {name}")


@dataclass(frozen=True)
class Row:
    """One fault of one drill."""

    fault: str
    injected: int
    survived: int  # of them: what ran finished, or stopped with a clear error and then finished
    lost: int  # examples, steps or committed objects that are gone for good: must be 0
    bitwise_equal: bool  # to what an undisturbed run gives
    seconds_lost: float  # beyond an undisturbed run, in total
    note: str = ""


Drill = Callable[[Setting], Iterator[Row]]
