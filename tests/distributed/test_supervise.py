"""The supervisor around real launchers and real DeepSpeed ranks, on one node and on two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mdm.train import heartbeat
from mdm.utils import exit_codes
from tests.distributed.test_resume import losses
from tests.helpers import ROOT

pytestmark = pytest.mark.distributed
BIN = Path(sys.executable).parent
JOB = str(ROOT / "tests/distributed/train_job.py")


def start(arguments: list[str], run_dir: Path, options: dict) -> "subprocess.Popen[str]":
    env = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "pipelines/supervise.py"), "--backoff", "0.1"),
            *(*arguments, JOB, str(run_dir), json.dumps(options)),
        ],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launcher(name: str) -> list[str]:
    if name == "deepspeed":
        return ["--", str(BIN / "deepspeed"), "--num_accelerators", "2", "--no_local_rank"]
    return ["--", str(BIN / "torchrun"), "--nproc-per-node", "2"]


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=900)
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    process = start(launcher("torchrun"), run_dir, {})
    output = finish(process)
    assert process.returncode == exit_codes.DONE, output
    return run_dir


@pytest.mark.parametrize(("name", "number"), [("deepspeed", "KILL"), ("torchrun", "STOP")])
def test_a_killed_or_stopped_rank_causes_one_restart(undisturbed, tmp_path, name, number):
    """Rank 1 is killed or stopped before step 8: the losses equal those of an undisturbed run."""
    run_dir = tmp_path / "run"
    options = {
        "signal_step": 8,
        "signal_ranks": [1],
        "signal": int(getattr(signal, f"SIG{number}")),
        "once": str(tmp_path / "once"),
        "train": {"hang_seconds": 6.0},
    }
    process = start(launcher(name), run_dir, options)
    output = finish(process)
    assert process.returncode == exit_codes.DONE, output
    assert losses(run_dir) == losses(undisturbed)
    done = json.loads((run_dir / "done.json").read_text())
    assert done["attempts"] == 2
    assert 0 < done["goodput"] < 1
    if number == "STOP":
        assert "no sign of life from rank 1" in output
        stacks = list((run_dir / "hangs").glob("*-rank-00000.stacks"))
        assert "take_step" in stacks[0].read_text()
        assert list((run_dir / "hangs").glob("*.collectives.json"))


def test_a_preempted_run_saves_and_the_same_command_resumes_it(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    options = {"signal_step": 4, "signal_ranks": [0], "signal": int(signal.SIGUSR1)}
    process = start(launcher("torchrun"), run_dir, {"train": {"checkpoint_every": 100}} | options)
    output = ""
    assert process.stdout is not None
    while "asked to stop, and saved; restart" not in output:  # only a rank was signalled
        line = process.stdout.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert process.returncode == exit_codes.REQUEUE
    (run_dir / heartbeat.STOP_FILE).touch()
    process = start(launcher("torchrun"), run_dir, {"train": {"checkpoint_every": 100}})
    output = finish(process)
    assert process.returncode == exit_codes.HALTED, output
    (run_dir / heartbeat.STOP_FILE).unlink()
    process = start(launcher("torchrun"), run_dir, {"train": {"checkpoint_every": 100}})
    output = finish(process)
    assert process.returncode == exit_codes.DONE, output
    assert losses(run_dir) == losses(undisturbed)


def test_a_lost_node_rejoins_the_job(undisturbed, tmp_path):
    """Two supervisors with one rank each; all processes of one node are killed and restarted."""
    hosts, run_dir = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    options = {"signal_step": 8, "signal_ranks": [1], "once": str(tmp_path / "once")}
    options["signal"] = int(signal.SIGSTOP)  # the rank stops there until its node is killed
    command = ["--", str(BIN / "deepspeed"), "--no_local_rank"]

    def node(name: str) -> "subprocess.Popen[str]":
        arguments = [
            "--hostfile",
            str(hosts),
            "--rendezvous",
            str(tmp_path / "meet"),
            "--node",
            name,
        ]
        return start([*arguments, *command], run_dir, options)

    first, second = node("node-a"), node("node-b")
    while not (tmp_path / "once").exists():
        assert first.poll() is None
        assert second.poll() is None
        time.sleep(0.2)
    for process in [*psutil.Process(second.pid).children(recursive=True), second]:
        process.kill()  # as in a power failure
    second.communicate()
    second = node("node-b")
    outputs = [finish(first), finish(second)]
    assert [first.returncode, second.returncode] == [exit_codes.DONE] * 2, "\n".join(outputs)
    assert losses(run_dir) == losses(undisturbed)
