"""What our training step costs beside a bare DeepSpeed loop: two ranks, one model, same batches.

Steps of both take turns in the same processes, so that a busy moment hits both.
"""

import json
import tempfile
from pathlib import Path

from tests.benchmarks.timing import Result
from tests.helpers import run_ranks


def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        code, output = run_ranks(
            Path(__file__).with_name("engine_overhead_job.py"), 2, str(out), timeout=900
        )
        if code != 0:
            raise RuntimeError(output[-2000:])
        found = json.loads(out.read_text())
    ours, bare = found["ours"], found["bare"]
    return Result(
        "engine_overhead",
        "ms/step",
        ours,
        {"DeepSpeed alone": bare},
        f"ZeRO-3, 2 ranks, {found['parameters'] / 1e6:.1f} M parameters, batch {found['batch']}",
        more={"share_of_step": {k: v / ours for k, v in found["parts"].items()}},
    )
