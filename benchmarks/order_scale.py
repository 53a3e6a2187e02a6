"""Open, draw, resume and trace in data sets of 10^7, 10^9 and 10^10 samples.

The manifest and its parts are real objects in a folder, which are read, verified and decoded by the
code that a run uses. All full parts are the same object, and there are no shards behind them. The
peer keeps the order of an epoch as one permutation of all rows in memory.
"""

import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.timing import Result
from mdm.data import resume
from mdm.data.manifest import Manifest
from mdm.data.mixture import Mixture, Source
from mdm.data.order import SampleOrder, layout_of
from tests.data_sets import vast

SIZES = (10**7, 10**9, 10**10)
GLOBAL_BATCH, SEED, ROUNDS = 256, 5, 7


def _order(uri: str) -> SampleOrder:
    layout_of.cache_clear()  # as in a new process
    manifest = Manifest.load(uri)
    return SampleOrder(Mixture((Source("web", manifest),), GLOBAL_BATCH), SEED)


def _resume(uri: str, state: str) -> None:
    order = _order(uri)
    resume.check(json.loads(state), order, {})
    order.draw(json.loads(state)["step"])


def _milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def measure(uri: str, rows: int) -> dict[str, float]:
    """Milliseconds of each operation from a closed data set; peak memory of a resume in MiB."""
    deep = 3 * rows // GLOBAL_BATCH + int(0.9 * rows) // GLOBAL_BATCH  # in the fourth epoch
    state = json.dumps(resume.state_dict(_order(uri), {}, deep, ""))
    operations: dict[str, Callable[[], object]] = {
        "open": lambda: Manifest.load(uri),
        "step 0": lambda: _order(uri).draw(0),
        "deep step": lambda: _order(uri).draw(deep),
        "resume": lambda: _resume(uri, state),
        "uses of a sample": lambda: list(_order(uri).uses(0, rows // 3, deep)),
    }
    figures = {name: _milliseconds(call) for name, call in operations.items()}
    order = _order(uri)
    order.draw(deep)
    steps = iter(range(deep + 1, deep + 10**6))
    figures["next step"] = _milliseconds(lambda: order.draw(next(steps)))
    tracemalloc.start()
    _resume(uri, state)
    figures["peak MiB"] = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return figures


def _permutation(rows: int, step: int) -> object:
    order = np.random.default_rng(SEED).permutation(rows)
    return order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]


def run() -> Result:
    """Print the table; the ratio is that of a resume at 10^7, where the peer fits in memory."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in SIZES:
            uri = str(Path(folder, str(rows)))
            vast(uri, rows)
            table[f"{rows:.0e}"] = measure(uri, rows)
    names = list(next(iter(table.values())))
    print(f"  {'samples':>8} " + " ".join(f"{n:>16}" for n in names))
    for samples, figures in table.items():
        print(f"  {samples:>8} " + " ".join(f"{figures[n]:>16.2f}" for n in names))
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
