"""Runs the named benchmarks, or all of them: `python -m benchmarks [names]`.

Each prints its results and writes `runs/bench/<name>.json`.
"""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import torch

import benchmarks as package
from benchmarks import timing
from mdm.utils.command_line import fail
from mdm.utils.precision import describe, resolve

HELPERS = {
    "__main__",
    "timing",
    "shapes",
    "encoding",
    "checkpoint_job",
    "engine_overhead_job",
    "loading",
    "loader_contestant",
    "loader_job",
    "loader_others",
    "loader_ours",
    "loader_samples",
}
OUT = Path("runs/bench")


def main(names: list[str]) -> None:
    """Run the benchmarks in `names`, or all if it is empty."""
    known = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in HELPERS]
    if {"-h", "--help"} & set(names):
        print(f"{__doc__}\nThere are {', '.join(known)}.")
        return
    for name in names:
        if name not in known:
            fail(f"bench: unknown benchmark {name!r}; there are {', '.join(known)}")
    torch.set_num_threads(timing.THREADS)
    OUT.mkdir(parents=True, exist_ok=True)
    machine = f"precision auto: {describe(resolve('auto'))}"
    print(machine, flush=True)
    for name in names or known:
        result: timing.Result = importlib.import_module(f"benchmarks.{name}").run()
        print(result.line(), flush=True)
        values = result.to_dict() | {"machine": machine}
        (OUT / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
