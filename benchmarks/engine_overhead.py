"""Our training step against a bare DeepSpeed loop: two ranks, the same model and batches.

Both take steps in turn in the same processes, so that a busy machine slows both down.
"""

import json
import tempfile
from pathlib import Path

from benchmarks.timing import Result
from tests.helpers import run_ranks

JOB = Path(__file__).with_name("engine_overhead_job.py")


def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        code, output = run_ranks(JOB, 2, str(out), timeout=900)
        if code != 0:
            raise RuntimeError(output[-2000:])
        figures = json.loads(out.read_text())
    ours, bare, millions = figures["ours"], figures["bare"], figures["parameters"] / 1e6
    return Result(
        "engine_overhead",
        "ms/step",
        ours,
        {"DeepSpeed alone": bare},
        f"ZeRO-3, 2 ranks, {millions:.1f} M parameters, batch {figures['batch']}",
        more={"share_of_step": {k: v / ours for k, v in figures["parts"].items()}},
    )
