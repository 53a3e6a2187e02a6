"""Ctrl-C in `pretrain.py` without a launcher, and folders that a run cannot use."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.digits.data import write
from tests.helpers import ROOT, newest_valid

pytestmark = pytest.mark.distributed

WATCH_PROGRAM = """
import sys, time
from pathlib import Path
from mdm.train.heartbeat import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), 0, 1, 600.0)
if sys.argv[2] == "training":
    heartbeat.begin_step(0)
try:
    print("ready", flush=True)
    while not heartbeat.requested:
        time.sleep(0.01)
    print("saving", heartbeat.requested, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learn")
    write(folder)
    return folder


def start_training(
    data: Path, run_dir: str | Path, steps: int, *flags_of_test: str
) -> "subprocess.Popen[str]":
    model = {"kernel": "torch", "n_layer": 2, "d_model": 64, "d_state": 16}
    train = {"steps": steps, "threads": 1, "warmup": 5, "checkpoint_every": 2, "log_every": 1}
    flags = [f"--model.{k}={v}" for k, v in model.items()]
    flags += [f"--train.{k}={v}" for k, v in train.items()]
    flags += [f"--data.root={data / 'encoded'}", f"--tokenizer={data / 'tokenizer.model'}"]
    flags += ["--preset=learn", "--data.global_batch=8", f"--run_dir={run_dir}", *flags_of_test]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines" / "pretrain.py"), *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_saves_and_ends_a_training_without_a_launcher(data: Path, tmp_path: Path) -> None:
    job = start_training(data, (tmp_path / "a run #1").as_uri(), 5000)
    checkpoints = tmp_path / "a run #1" / "checkpoints"
    while not (checkpoints / "step-00000002" / "COMMITTED").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output
    assert "Traceback" not in output
    assert "Ctrl-C: saving, then ending" in output
    record, _ = newest_valid(checkpoints)
    assert record is not None
    assert f"saved at step {record.step}; run again" in output


def interrupt_watch(tmp_path: Path, state: str) -> "subprocess.Popen[str]":
    """A process with a `Heartbeat`, starting or training, after one Ctrl-C."""
    job = subprocess.Popen(
        [sys.executable, "-c", WATCH_PROGRAM, str(tmp_path), state],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    return job


def test_a_second_ctrl_c_ends_at_once_but_one_press_delivered_twice_does_not(
    tmp_path: Path,
) -> None:
    with interrupt_watch(tmp_path, "training") as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "saving 75\n"
        job.send_signal(signal.SIGINT)  # the terminal and the launcher both deliver one press
        time.sleep(0.7)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        _, stderr = job.communicate(timeout=30)
    assert job.returncode == 130
    assert stderr.splitlines()[-1] == "Ctrl-C again: ended at once; the last checkpoint counts"
    assert "Traceback" not in stderr


def test_ctrl_c_before_the_first_step_ends_without_saving(tmp_path: Path) -> None:
    with interrupt_watch(tmp_path, "starting") as job:
        assert job.wait(timeout=30) == 3


def test_a_run_dir_that_cannot_be_written_is_refused_in_one_line(data: Path) -> None:
    for folder in (Path("/proc/run"), data / "tokenizer.model" / "run"):
        job = start_training(data, folder, 1)
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 2
        assert output.count("\n") == 1
        assert output.startswith(f"pretrain: cannot write {folder}")
        assert "--run_dir" in output


def test_a_checkpoint_uri_of_an_unknown_store_is_refused_in_one_line(
    data: Path, tmp_path: Path
) -> None:
    job = start_training(data, tmp_path / "run", 1, "--train.checkpoints=gs://bucket/run")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2
    assert output.count("\n") == 1
    assert output.startswith("pretrain: 'gs://bucket/run' is not a store; use s3://bucket/prefix")
    assert not (tmp_path / "run").exists()
