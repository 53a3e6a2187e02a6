"""Opening, drawing, resuming and tracing in data sets of 10^7, 10^9 and 10^10 samples.

The manifest and its parts are real objects in a folder, read, verified and decoded by the code that
a run uses; all full parts are the same object, so that no shard has to lie behind them. Peer: an
epoch's order as one permutation of all rows in memory, as loaders keep it that shuffle whole.
"""

import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mdm.data import resume
from mdm.data.manifest import Manifest
from mdm.data.mixture import Mixture, Source
from mdm.data.order import Order, layout_of
from tests.benchmarks.timing import Result
from tests.data_sets import vast

SIZES = (10**7, 10**9, 10**10)
GLOBAL_BATCH, SEED, ROUNDS = 256, 5, 7


def _order(uri: str) -> Order:
    layout_of.cache_clear()  # as a new process begins
    manifest = Manifest.load(uri)
    return Order(Mixture((Source("web", manifest),), GLOBAL_BATCH), SEED)


def _resume(uri: str, state: str) -> None:
    order = _order(uri)
    resume.check(json.loads(state), order, 0)
    order.draw(json.loads(state)["step"])


def _milliseconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def measure(uri: str, rows: int) -> dict[str, float]:
    """Milliseconds of each operation from nothing, and the peak of a resume's memory in MiB."""
    deep = 3 * rows // GLOBAL_BATCH + int(0.9 * rows) // GLOBAL_BATCH  # in the fourth epoch
    state = json.dumps(resume.state_dict(_order(uri), 0, deep, ""))
    operations: dict[str, Callable[[], object]] = {
        "open": lambda: Manifest.load(uri),
        "step 0": lambda: _order(uri).draw(0),
        "deep step": lambda: _order(uri).draw(deep),
        "resume": lambda: _resume(uri, state),
        "uses of a sample": lambda: list(_order(uri).uses(0, rows // 3, deep)),
    }
    found = {name: _milliseconds(call) for name, call in operations.items()}
    order = _order(uri)
    order.draw(deep)
    steps = iter(range(deep + 1, deep + 10**6))
    found["next step"] = _milliseconds(lambda: order.draw(next(steps)))
    tracemalloc.start()
    _resume(uri, state)
    found["peak MiB"] = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return found


def _permutation(rows: int, step: int) -> object:
    order = np.random.default_rng(SEED).permutation(rows)
    return order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]


def run() -> Result:
    """Print the table; the ratio is of a resume at 10^7, where the peer's memory is at hand."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in SIZES:
            uri = str(Path(folder, str(rows)))
            vast(uri, rows)
            table[f"{rows:.0e}"] = measure(uri, rows)
    names = list(next(iter(table.values())))
    print(f"  {'samples':>8} " + " ".join(f"{n:>16}" for n in names))
    for rows, found in table.items():
        print(f"  {rows:>8} " + " ".join(f"{found[n]:>16.2f}" for n in names))
    least = SIZES[0]
    peer = _milliseconds(lambda: _permutation(least, least // GLOBAL_BATCH // 2))
    return Result(
        "order_scale",
        "ms",
        table[f"{least:.0e}"]["resume"],
        {"one permutation of all rows": peer},
        f"resume at 10^7 samples; ms from a closed data set, at {', '.join(table)} in `more`",
        more={"table": table},
    )
