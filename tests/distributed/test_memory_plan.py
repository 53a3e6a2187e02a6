"""The memory plan against real ranks, and the rehearsal."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed import memory_plan_job
from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.distributed


def test_two_ranks_use_the_planned_memory(tmp_path):
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
    process = rehearse(*flags)
    assert process.returncode == 0, process.stderr
    report = json.loads(out.read_text())
    built = report["built"]
    assert built["applied"]
    for name, planned in built["planned"].items():
        assert abs(built["held"][name] - planned) <= 0.1 * planned, name
    assert not report["verdict"]["fits"]
    assert "does not fit" in process.stdout
    assert "GPU-hours" in process.stdout


def test_a_rehearsal_that_does_not_fit_names_the_flag_to_change(tmp_path):
    flags = ["--step_tokens", "0", "--world_size", "4", "--out", str(tmp_path / "r.json")]
    verdict = json.loads(_report(flags, tmp_path, "80GiB"))["verdict"]
    assert verdict["fits"]
    less_memory = verdict["total"] - 2**20
    verdict = json.loads(_report(flags, tmp_path, str(less_memory)))["verdict"]
    assert verdict["remedies"][0] == "--train.activation_checkpointing"


def _report(flags: list[str], tmp_path, memory: str) -> str:
    process = rehearse(*flags, "--gpu_memory", memory)
    assert process.returncode == 0, process.stderr
    return (tmp_path / "r.json").read_text()


def test_a_wrong_flag_is_refused_in_one_line():
    for flags, message in (
        (("--gpu_memory", "80 apples"), "80 apples"),
        (("--world_size", "0"), "--world_size is 0"),
        (("--world_size", "7"), "not a multiple of 7"),
    ):
        process = rehearse("--step_tokens", "0", *flags)
        assert process.returncode == 2
        assert message in process.stderr
        assert process.stderr.count("\n") == 1
