"""A process that loads the batches of all ranks until it is killed, and the drill's side of it.

Ranks do not communicate when they load, so one process can act for all of them.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from mdm.config import DataConfig
from mdm.data.loader import Loader
from mdm.data.mixture import open_mixture
from mdm.utils.ranks import World
from mdm.utils.saved_config import from_dict, to_dict
from tests.helpers import ROOT
from tests.unit.data.elastic_job import LENGTHS

SEED = 7


@dataclass(frozen=True)
class Step:
    """One step: the sample ids of each rank, and the loader state after it."""

    parts: list[list[str]]
    state: dict[str, Any]

    def ids(self) -> list[str]:
        """The ids of the global batch, which do not depend on the number of ranks."""
        return [i for part in self.parts for i in part]


def walk(
    config: DataConfig,
    ranks: int,
    state: dict[str, Any] | None,
    steps: int,
    seconds: float = 0.0,
    **settings: int,
) -> list[Step]:
    """Load `steps` steps from a state on; the process is killed `seconds` after the last one."""
    plan = {"data": to_dict(config), "ranks": ranks, "state": state, "settings": settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.drills.loader_life", json.dumps(plan)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(steps)]
        time.sleep(seconds)
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert lines[-1].endswith("\n"), stderr
    return [Step(*json.loads(line)) for line in lines]


def main() -> None:
    """Print one line of JSON a step: the ids by rank, and the loader state after it."""
    plan = json.loads(sys.argv[1])
    mixture = open_mixture(from_dict(DataConfig, plan["data"]))
    loaders = [
        Loader(mixture, SEED, World(rank=r, size=plan["ranks"]), **LENGTHS, **plan["settings"])
        for r in range(plan["ranks"])
    ]
    for loader in loaders:
        if plan["state"] is not None:
            loader.load_state_dict(plan["state"])
    while True:
        parts = [list(next(loader).ids) for loader in loaders]
        states = [loader.state_dict() for loader in loaders]
        assert all(state == states[0] for state in states)
        print(json.dumps([parts, states[0]]), flush=True)


if __name__ == "__main__":
    main()
