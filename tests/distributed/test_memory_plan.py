"""The memory plan of a rehearsal against real ranks, and the rehearsal itself."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed import memory_plan_job
from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.distributed


def test_two_ranks_hold_what_was_planned(tmp_path):
    code, output = run_ranks(ROOT / "tests/distributed/memory_plan_job.py", 2, str(tmp_path))
    assert code == 0, output


def rehearse(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipelines/rehearse.py", "--preset", "demo", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)


def test_one_process_rehearses_any_number_of_ranks(tmp_path):
    memory_plan_job.config_of(tmp_path, False)  # writes the JSON
    out = tmp_path / "report.json"
    flags = [
        *("--world-size", "64", "--gpu-memory", "1MiB", "--threads", "1"),
        *("--train.deepspeed", str(tmp_path / "zero3.json"), "--train.gather", "block"),
        *("--out", str(out), "--step_tokens", "8"),
    ]
    done = rehearse(*flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    built = report["built"]
    assert built["applied"]
    for name, planned in report["built"]["planned"].items():
        assert abs(built["held"][name] - planned) <= 0.1 * planned, name
    assert not report["verdict"]["fits"]
    assert "does not fit" in done.stdout
    assert "GPU-hours" in done.stdout


def test_a_rehearsal_says_what_to_change(tmp_path):
    flags = ["--step_tokens", "0", "--world_size", "4", "--out", str(tmp_path / "r.json")]
    planned = json.loads(_plan(flags, tmp_path, "80GiB"))["verdict"]
    assert planned["fits"]
    less = planned["total"] - 2**20
    verdict = json.loads(_plan(flags, tmp_path, str(less)))["verdict"]
    assert verdict["remedies"][0] == "--train.activation_checkpointing true"


def _plan(flags: list[str], tmp_path, memory: str) -> str:
    done = rehearse(*flags, "--gpu_memory", memory)
    assert done.returncode == 0, done.stderr
    return (tmp_path / "r.json").read_text()


def test_mistakes_are_one_line():
    for flags, message in (
        (("--gpu_memory", "80 apples"), "80 apples"),
        (("--world_size", "0"), "--world_size is 0"),
        (("--world_size", "7"), "not a multiple of 7"),
    ):
        done = rehearse("--step_tokens", "0", *flags)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
