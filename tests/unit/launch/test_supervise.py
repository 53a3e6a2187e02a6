"""The supervisor with small programs as ranks; tests/distributed has real ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mdm.launch import supervisor
from mdm.launch.rendezvous import Attempt
from mdm.utils import exit_codes
from tests.helpers import ROOT

# A "rank" that follows a script, one entry for each attempt.
RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from mdm.train import heartbeat
folder = Path(sys.argv[1]); script = json.loads(sys.argv[2])
number = len(list(folder.glob("attempt-*")))
(folder / f"attempt-{number}").write_text(os.environ["MASTER_PORT"])
act = script[min(number, len(script) - 1)]
os.environ.setdefault("RANK", "0")
w = heartbeat.Heartbeat(folder, 0, 1, act.get("hang", 60.0))
for step in range(act.get("from", 0), act["to"]):
    w.begin_step(step)
    time.sleep(0.01)
if act.get("shm"): Path(act["shm"]).write_bytes(b"x")
if act.get("orphan"):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / "orphan").write_text(str(child.pid))
if "signal" in act: os.kill(os.getpid(), act["signal"])
while act.get("wait") and not w.requested:
    w.begin_step(step); time.sleep(0.05)
code = w.requested or act.get("code", 0)
if "code" in act or w.requested: heartbeat.report_end(code, act.get("reason", ""))
os._exit(code)
"""


def start(folder: Path, script: list[dict], *flags: str) -> "subprocess.Popen[str]":
    program = folder / "rank.py"
    program.write_text(RANK)
    own = ["--backoff", "0.05", *flags]
    command = [sys.executable, "pipelines/supervise.py", *own, "--", sys.executable]
    return subprocess.Popen(
        [*command, str(program), str(folder), json.dumps(script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, script: list[dict], *flags: str) -> tuple[int, str]:
    process = start(folder, script, *flags)
    _, output = process.communicate(timeout=120)
    return process.returncode, output


def attempts(folder: Path) -> list[str]:
    return [p.read_text() for p in sorted(folder.glob("attempt-*"))]


def test_a_killed_and_a_failed_attempt_are_restarted_until_one_is_done(tmp_path):
    """Each attempt has a port of its own, and nothing is left behind."""
    shared = Path("/dev/shm") / f"deepspeed_allreduce_buffer_test{os.getpid()}"
    script = [
        {"to": 3, "signal": signal.SIGKILL, "shm": str(shared), "orphan": True},
        {"to": 4, "code": 1, "reason": "the loss is NaN"},
        {"to": 5, "code": 0},
    ]
    code, output = run(tmp_path, script)
    assert code == exit_codes.DONE, output
    assert "rank 0 ended without a report" in output
    assert "rank 0: the loss is NaN" in output
    assert "done after step 4" in output
    assert len(set(attempts(tmp_path))) == 3
    assert not shared.exists()
    assert not psutil.pid_exists(int((tmp_path / "orphan").read_text()))
    assert not list(Path("/tmp").glob(f"mdm-heartbeats-*{os.getpid()}*"))


def test_exit_code_0_without_a_report_is_no_success(tmp_path):
    """DeepSpeed's front end exits with 0 when its launcher is killed."""
    code, output = run(tmp_path, [{"to": 2}, {"to": 3, "code": 0}])
    assert code == exit_codes.DONE
    assert "rank 0 ended without a report; restart" in output
    assert len(attempts(tmp_path)) == 2


def test_a_stopped_rank_is_named_and_replaced(tmp_path, monkeypatch):
    script = [{"to": 3, "hang": 0.5, "signal": signal.SIGSTOP}, {"to": 4, "code": 0}]
    process = start(tmp_path, script)
    _, output = process.communicate(timeout=120)
    assert process.returncode == exit_codes.DONE
    assert "no heartbeat of rank 0 (in step of step 2)" in output


def test_the_budget_counts_failures_without_a_step_forward(tmp_path):
    stuck = [{"to": 3, "code": 1}]
    code, output = run(tmp_path, stuck, "--restarts", "2")
    assert code == exit_codes.GAVE_UP
    assert "3 failures in a row without a step forward" in output
    assert len(attempts(tmp_path)) == 3
    (tmp_path / "b").mkdir()
    forward = [{"to": n, "code": 1} for n in range(1, 7)] + [{"to": 8, "code": 0}]
    code, output = run(tmp_path / "b", forward, "--restarts", "1")
    assert code == exit_codes.DONE, output


@pytest.mark.parametrize("code", [exit_codes.MISTAKE, exit_codes.HALTED])
def test_what_the_user_has_to_decide_is_not_restarted(tmp_path, code):
    exit_code, output = run(tmp_path, [{"to": 1, "code": code, "reason": "--train.lr is -1"}])
    assert exit_code == code
    assert "--train.lr is -1" in output
    assert len(attempts(tmp_path)) == 1


def test_a_signal_makes_the_ranks_save_and_the_scheduler_requeue(tmp_path):
    process = start(tmp_path, [{"to": 3, "wait": True}])
    while not attempts(tmp_path):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    _, output = process.communicate(timeout=60)
    assert process.returncode == exit_codes.REQUEUE
    assert "SIGUSR1: asked to stop, and saved" in output


def test_a_single_rank_that_is_asked_to_stop_is_restarted(tmp_path):
    code, output = run(tmp_path, [{"to": 3, "code": exit_codes.REQUEUE}, {"to": 4, "code": 0}])
    assert code == exit_codes.DONE
    assert "asked to stop, and saved; restart in 0 s (0 of 10)" in output


def test_nothing_survives_the_supervisor(tmp_path):
    process = start(tmp_path, [{"to": 3, "wait": True}])
    while not attempts(tmp_path):
        time.sleep(0.05)
    (rank,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs([rank], timeout=20)[1]


def test_the_supervisors_own_mistakes_end_with_one_line(tmp_path):
    for words, message in (
        ([], "no command"),
        (["--restarts", "-1", "--", "true"], "--restarts is -1"),
        (["--hostfile", "x", "--", "true"], "belong together"),
        (["--", "/no/such/program"], "cannot run /no/such/program"),
    ):
        done = subprocess.run(
            [sys.executable, "pipelines/supervise.py", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == exit_codes.MISTAKE
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_launchers_get_the_port_and_the_nodes(tmp_path):
    alone = Attempt(1, ("here",), "127.0.0.1", 4000)
    command = supervisor.command_of(["/x/deepspeed", "--num_gpus", "8", "job.py"], alone, tmp_path)
    assert command == ["/x/deepspeed", "--master_port", "4000", "--num_gpus", "8", "job.py"]
    two = Attempt(2, ("a", "b"), "10.0.0.1", 4001, rank=1, hosts={"a": 8, "b": 8})
    command = supervisor.command_of(["deepspeed", "job.py"], two, tmp_path)
    assert command[1:9] == [
        *("--master_port", "4001", "--hostfile", str(tmp_path / "hostfile")),
        *("--no_ssh", "--master_addr", "10.0.0.1", "--node_rank"),
    ]
    assert (tmp_path / "hostfile").read_text() == "a slots=8\nb slots=8\n"
    command = supervisor.command_of(["torchrun", "job.py"], two, tmp_path)
    assert command[-3:] == ["--nproc-per-node", "8", "job.py"]
    assert command[command.index("--node-rank") + 1] == "1"
