"""Two jobs on one run: the second names the first in one line and exits without a change."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mdm.checkpoint.checkpoints import Checkpoints
from mdm.storage import LocalStore
from mdm.storage.lease import hold
from mdm.train.writer import RUN_LEASE
from mdm.utils import exit_codes
from tests.distributed.test_resume import losses, newest_checkpoint
from tests.distributed.test_supervise import finish, launcher, start
from tests.helpers import ROOT, start_ranks_of

pytestmark = pytest.mark.distributed
JOB = ROOT / "tests/distributed/train_job.py"
ENV = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start_job(run_dir: Path, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(JOB), str(run_dir), json.dumps(options)],
        env=os.environ | ENV,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def paused_job(run_dir: Path, gate: Path, **options: Any) -> "subprocess.Popen[str]":
    """A run that has saved step 6 and waits for the file `gate` before step 8."""
    process = start_job(run_dir, wait_for={"8": str(gate)}, **options)
    while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < 8:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(0.5)  # until the save is done
    return process


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of all files, except what a waiting run updates itself."""
    return {
        str(path): (path.name != "events.jsonl" and path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != RUN_LEASE
    }


def assert_refused(output: str, first: int, run_dir: Path) -> None:
    """The output has one line about the refusal, and it names the first job."""
    lines = [line for line in output.splitlines() if "is being written by another job" in line]
    assert len(lines) == 1, output
    assert f"(process {first} on {os.uname().nodename} since " in lines[0]
    assert f", run {run_dir}): wait for it" in lines[0]
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]


def test_a_second_training_is_refused_and_does_not_affect_the_first(tmp_path, s3):
    first_dir, other_dir, gate = tmp_path / "run", tmp_path / "other", tmp_path / "gate"
    undisturbed = start_job(tmp_path / "whole")
    first = paused_job(first_dir, gate, train={"checkpoints": s3})
    try:
        before, objects = contents(first_dir), Checkpoints.at(s3).store.listing("step-")
        assert {name.partition("/")[0] for name in objects} == {"step-00000006"}
        options = {"resume": "none", "train": {"checkpoints": s3}, "track": True}
        seconds = [
            start_ranks_of(JOB, 2, str(first_dir), json.dumps(options)),
            start_job(other_dir, **options),  # its own folder, but the same checkpoints
            start_job(first_dir),  # the same folder, but its own checkpoints
        ]
        for second in seconds:
            output, _ = second.communicate(timeout=300)
            assert_refused(output, first.pid, first_dir)
            if second is seconds[0]:
                assert "exitcode  : 2 " in output  # of each rank; the launcher exits with 1
            else:
                assert second.returncode == exit_codes.MISTAKE
        assert not other_dir.exists()
        assert not (first_dir / "checkpoints").exists()
        assert contents(first_dir) == before
        assert Checkpoints.at(s3).store.listing("step-") == objects
    finally:
        gate.touch()
        output, _ = first.communicate(timeout=300)
    assert first.returncode == exit_codes.DONE, output
    assert not (first_dir / RUN_LEASE).exists()
    assert RUN_LEASE not in Checkpoints.at(s3).store.listing()
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == exit_codes.DONE, output
    assert losses(first_dir) == losses(tmp_path / "whole")
    records = [newest_checkpoint(uri)[1] for uri in (s3, tmp_path / "whole" / "checkpoints")]
    assert records[0].files == records[1].files
    events = (first_dir / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events] == ["started", "saved", "saved", "ended"]


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_job_that_lost_its_lease_while_stopped_commits_nothing_and_reports_it(tmp_path, place):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    job = paused_job(run_dir, gate)
    job.send_signal(signal.SIGSTOP)
    other_lease = {"token": "x", "pid": 7, "host": "far", "about": "run elsewhere"}
    (run_dir / place / RUN_LEASE).write_text(json.dumps(other_lease))
    before = contents(run_dir)
    gate.touch()
    job.send_signal(signal.SIGCONT)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == exit_codes.MISTAKE, output
    assert output.splitlines()[-1].startswith(
        f"{(run_dir / place).absolute()} was taken over by another job (process 7 on far, run else"
    )
    assert "Traceback" not in output
    after = contents(run_dir)
    if place:  # it still holds the lease of the folder, so it may add lines there
        assert losses(run_dir)[-1][0] <= 12
        assert not (run_dir / "done.json").exists()
    else:
        assert after == before
    records, _ = Checkpoints.at(str(run_dir / "checkpoints")).newest_first()
    assert [record.name for record in records] == ["step-00000006"]
    assert json.loads((run_dir / place / RUN_LEASE).read_text()) == other_lease


def test_the_supervisor_of_a_second_job_exits_at_once_without_a_restart(tmp_path):
    run_dir = tmp_path / "run"
    with hold(LocalStore(run_dir), f"run {run_dir}", key=RUN_LEASE):
        before = sorted(run_dir.iterdir())
        process = start(launcher("torchrun"), run_dir, {})
        output = finish(process)
        assert process.returncode == exit_codes.MISTAKE, output
        assert "restart in" not in output
        lines = [line for line in output.splitlines() if line.startswith("supervise: ")]
        assert len(lines) == 1
        assert f"{run_dir} is being written by another job (process {os.getpid()} on" in lines[0]
        assert sorted(run_dir.iterdir()) == before
