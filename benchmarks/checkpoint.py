"""How long a save blocks training, compared with DeepSpeed's; then time to durability and restore.

Runs two real ranks on this machine. Our save also includes the EMA, flushes to the disk and hashes;
`engine.save_checkpoint` does none of the three.
"""

import json
import os
import tempfile
from pathlib import Path

from benchmarks.timing import Result
from mdm.storage.server import S3Server
from tests.helpers import run_ranks

JOB = Path(__file__).with_name("checkpoint_job.py")
RANKS = 2


def job(*args: str) -> dict[str, float]:
    """The figures of the slowest rank, which the job prints as its last line."""
    code, output = run_ranks(JOB, RANKS, *args, timeout=1800)
    if code:
        raise RuntimeError(f"{JOB.name} ended with {code}:\n{output[-3000:]}")
    line = next(line for line in reversed(output.splitlines()) if line.startswith("{"))
    figures: dict[str, float] = json.loads(line)
    return figures


def run() -> Result:
    """Milliseconds for which a save blocks a step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = job("save", name, str(folder / "ours"))
        local_resume = job("resume", name, str(folder / "ours"))
        with S3Server(folder / "s3", bucket="bench") as server:
            os.environ.update(server.env)
            remote = job("save", name, "s3://bench/run")
            remote_resume = job("resume", name, "s3://bench/run")
    figures = {
        "durable_seconds": local["durable"],
        "durable_seconds_s3": remote["durable"],
        "blocked_ms_s3": remote["blocked"],
        "restore_seconds": local_resume["restore"],
        "restore_seconds_s3": remote_resume["restore"],
        "restart_to_first_step_seconds": local_resume["first_step"],
        "restart_to_first_step_seconds_s3": remote_resume["first_step"],
        "ema_ms": local["ema"],
        "step_ms": local["step"],
        "mebibytes": local["mebibytes"],
    }
    for figure, value in figures.items():
        print(f"  {figure} {value:.4g}")
    return Result(
        "checkpoint",
        "ms blocked",
        local["blocked"],
        {"engine.save_checkpoint": local["deepspeed"]},
        f"{RANKS} ranks, ZeRO-3, {local['mebibytes']:.0f} MiB of weights, moments and EMA",
        more=figures,
    )
