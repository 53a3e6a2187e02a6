"""A step of the demo against a bare DeepSpeed loop and the model alone: two ranks, equal batches.

All take steps in turn in the same processes, so that a busy machine slows all of them down. The
model alone is forward, backward and AdamW on the rank's share, without an engine or a collective:
`not_the_model` is the share of our step that is more than that.
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
    ours, bare, alone = figures["ours"], figures["bare"], figures["alone"]
    millions = figures["parameters"] / 1e6
    print(f"  not the model's compute: {1 - alone / ours:.1%} of our step", flush=True)
    return Result(
        "engine_overhead",
        "ms/step",
        ours,
        {"DeepSpeed alone": bare},
        f"ZeRO-3, 2 ranks, {millions:.1f} M parameters, batch {figures['batch']}",
        floor=alone,
        more={
            "not_the_model": 1 - alone / ours,
            "share_of_step": {k: v / ours for k, v in figures["parts"].items()},
        },
    )
