"""Ctrl-C in a bare `python pipelines/pretrain.py`, and folders that a run cannot use."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.digits.data import write
from mdm.checkpoint.checkpoints import Checkpoints
from tests.helpers import ROOT

pytestmark = pytest.mark.distributed

WATCHED = """
import sys, time
from pathlib import Path
from mdm.train.heartbeat import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), 0, 1, 600.0)
if sys.argv[2] == "training":
    heartbeat.begin_step(0)
try:
    print("ready", flush=True)
    while not heartbeat.asked:
        time.sleep(0.01)
    print("saving", heartbeat.asked, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learn")
    write(folder)
    return folder


def start(data: Path, run_dir: str | Path, steps: int, *others: str) -> "subprocess.Popen[str]":
    model = {"kernel": "torch", "n_layer": 2, "d_model": 64, "d_state": 16}
    train = {"steps": steps, "threads": 1, "warmup": 5, "checkpoint_every": 2, "log_every": 1}
    flags = [f"--model.{k}={v}" for k, v in model.items()]
    flags += [f"--train.{k}={v}" for k, v in train.items()]
    flags += [f"--data.root={data / 'encoded'}", f"--tokenizer={data / 'tokenizer.model'}"]
    flags += ["--preset=learn", "--data.global_batch=8", f"--run_dir={run_dir}", *others]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines" / "pretrain.py"), *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_saves_and_ends_a_bare_training(data: Path, tmp_path: Path) -> None:
    job = start(data, (tmp_path / "a run #1").as_uri(), 5000)
    at = tmp_path / "a run #1" / "checkpoints"
    while not (at / "step-00000002" / "COMMITTED").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 75, said
    assert "Traceback" not in said
    assert "Ctrl-C: saving, then ending" in said
    record, _ = Checkpoints.at(str(at)).latest_valid()
    assert record is not None
    assert f"saved at step {record.step}; run again to go on" in said


def watched(tmp_path: Path, state: str) -> "subprocess.Popen[str]":
    job = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(tmp_path), state],
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


def test_a_second_ctrl_c_ends_at_once_but_one_that_comes_twice_does_not(tmp_path: Path) -> None:
    with watched(tmp_path, "training") as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "saving 75\n"
        job.send_signal(signal.SIGINT)  # as a terminal and a launcher pass on one press
        time.sleep(0.7)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=30)
    assert job.returncode == 130
    assert err.splitlines()[-1] == "Ctrl-C again: ended at once; the last committed save counts"
    assert "Traceback" not in err


def test_ctrl_c_before_the_first_step_has_nothing_to_save(tmp_path: Path) -> None:
    with watched(tmp_path, "starting") as job:
        assert job.wait(timeout=30) == 3


def test_a_run_dir_that_cannot_be_used_is_one_line(data: Path) -> None:
    for folder in (Path("/proc/run"), data / "tokenizer.model" / "run"):
        job = start(data, folder, 1)
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 2
        assert said.count("\n") == 1
        assert said.startswith(f"pretrain: cannot write {folder}")
        assert "--run_dir" in said


def test_checkpoints_in_no_kind_of_store_are_one_line(data: Path, tmp_path: Path) -> None:
    job = start(data, tmp_path / "run", 1, "--train.checkpoints=gs://bucket/run")
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 2
    assert said.count("\n") == 1
    assert said.startswith("pretrain: 'gs://bucket/run' is no store; use s3://bucket/prefix")
    assert not (tmp_path / "run").exists()
