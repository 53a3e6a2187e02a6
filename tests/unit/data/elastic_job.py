"""One life of a run's loaders, with all ranks in this process; its plan comes from stdin.

It prints every rank's ids of the committed steps and the state after them, and then kills itself.
Before, it takes a few more steps, like a run that dies before its next checkpoint.
"""

import json
import os
import signal
import sys
from typing import Any

from mdm.config import DataConfig
from mdm.data.loader import Loader
from mdm.data.mixture import open_mixture
from mdm.utils.ranks import World
from mdm.utils.saved_config import from_dict

LENGTHS = {"caption_length": 8, "dialogue_length": 30}


def live(plan: dict[str, Any]) -> tuple[list[list[list[str]]], dict[str, Any]]:
    """Each committed step's ids by rank, and the state after them."""
    mixture = open_mixture(from_dict(DataConfig, plan["data"]))
    size = plan["ranks"]
    loaders = [
        Loader(mixture, 7, World(rank=r, size=size), **LENGTHS, **plan["settings"])
        for r in range(size)
    ]
    try:
        if plan["state"] is not None:
            for loader in loaders:
                loader.load_state_dict(plan["state"])
        steps = [[list(next(loader).ids) for loader in loaders] for _ in range(plan["steps"])]
        states = [loader.state_dict() for loader in loaders]
        assert all(state == states[0] for state in states)
        for loader in loaders:
            for _ in range(plan["lost"]):
                next(loader)
    finally:
        for loader in loaders:
            loader.close()
    return steps, states[0]


if __name__ == "__main__":
    steps, state = live(json.load(sys.stdin))
    sys.stdout.write(json.dumps([steps, state]))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
