"""How long a step waits for a save, beside DeepSpeed's own; then until it is durable, and back.

Two real ranks on this machine. Ours saves the average too, flushes to the disk and hashes;
`engine.save_checkpoint` does none of the three.
"""

import json
import os
import tempfile
from pathlib import Path

from mdm.storage.server import S3Server
from tests.benchmarks.timing import Result
from tests.helpers import ROOT, run_ranks

JOB = ROOT / "tests" / "benchmarks" / "checkpoint_job.py"
RANKS = 2


def job(*args: str) -> dict[str, float]:
    """What the job says on its last line, of its slowest rank."""
    code, output = run_ranks(JOB, RANKS, *args, timeout=1800)
    if code:
        raise RuntimeError(f"{JOB.name} ended with {code}:\n{output[-3000:]}")
    line = next(line for line in reversed(output.splitlines()) if line.startswith("{"))
    found: dict[str, float] = json.loads(line)
    return found


def run() -> Result:
    """Milliseconds that a step is blocked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = job("save", name, str(folder / "ours"))
        back = job("resume", name, str(folder / "ours"))
        with S3Server(folder / "s3", bucket="bench") as server:
            os.environ.update(server.env)
            remote = job("save", name, "s3://bench/run")
            remote_back = job("resume", name, "s3://bench/run")
    figures = {
        "durable_seconds": found["durable"],
        "durable_seconds_s3": remote["durable"],
        "blocked_ms_s3": remote["blocked"],
        "restore_seconds": back["restore"],
        "restore_seconds_s3": remote_back["restore"],
        "restart_to_first_step_seconds": back["first_step"],
        "restart_to_first_step_seconds_s3": remote_back["first_step"],
        "ema_ms": found["ema"],
        "step_ms": found["step"],
        "mebibytes": found["mebibytes"],
    }
    for figure, value in figures.items():
        print(f"  {figure} {value:.4g}")
    return Result(
        "checkpoint",
        "ms blocked",
        found["blocked"],
        {"engine.save_checkpoint": found["deepspeed"]},
        f"{RANKS} ranks, ZeRO-3, {found['mebibytes']:.0f} MiB of weights, moments and average",
        more=figures,
    )
