"""Two jobs on one run: the second ends with one line that names the first, and touches nothing."""

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
from tests.distributed.test_resume import losses, newest
from tests.distributed.test_supervise import finish, launcher, start
from tests.helpers import ROOT, start_ranks_of

pytestmark = pytest.mark.distributed
JOB = ROOT / "tests/distributed/train_job.py"
ENV = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def begin(run_dir: Path, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(JOB), str(run_dir), json.dumps(options)],
        env=os.environ | ENV,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def waiting(run_dir: Path, gate: Path, **options: Any) -> "subprocess.Popen[str]":
    """A run that has saved step 6 and waits before step 8 for `gate`."""
    process = begin(run_dir, wait_for={"8": str(gate)}, **options)
    while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < 8:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(0.5)  # until the save has ended
    return process


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of all that a living run does not itself touch while it waits."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (RUN_LEASE, "attempts.jsonl")
    }


def refused(output: str, first: int, run_dir: Path) -> None:
    """One line, and it names the first job."""
    lines = [line for line in output.splitlines() if "is being written by another job" in line]
    assert len(lines) == 1, output
    assert f"(process {first} on {os.uname().nodename} since " in lines[0]
    assert f", run {run_dir}): wait for it" in lines[0]
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]


def test_a_second_training_is_refused_and_the_first_one_is_untouched(tmp_path, s3):
    first_dir, other_dir, gate = tmp_path / "run", tmp_path / "other", tmp_path / "gate"
    undisturbed = begin(tmp_path / "whole")
    first = waiting(first_dir, gate, train={"checkpoints": s3})
    try:
        before, kept = files(first_dir), Checkpoints.at(s3).store.listing("step-")
        assert {name.partition("/")[0] for name in kept} == {"step-00000006"}
        options = {"resume": "none", "train": {"checkpoints": s3}, "track": True}
        seconds = [
            start_ranks_of(JOB, 2, str(first_dir), json.dumps(options)),
            begin(other_dir, **options),  # its folder is its own, and the checkpoints are not
            begin(first_dir),  # the other way round
        ]
        for second in seconds:
            output, _ = second.communicate(timeout=300)
            refused(output, first.pid, first_dir)
            if second is seconds[0]:
                assert "exitcode  : 2 " in output  # of each rank; the launcher's own is 1
            else:
                assert second.returncode == exit_codes.MISTAKE
        assert not other_dir.exists()
        assert not (first_dir / "checkpoints").exists()
        assert files(first_dir) == before
        assert Checkpoints.at(s3).store.listing("step-") == kept
    finally:
        gate.touch()
        output, _ = first.communicate(timeout=300)
    assert first.returncode == exit_codes.DONE, output
    assert not (first_dir / RUN_LEASE).exists()
    assert RUN_LEASE not in Checkpoints.at(s3).store.listing()
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == exit_codes.DONE, output
    assert losses(first_dir) == losses(tmp_path / "whole")
    records = [newest(uri)[1] for uri in (s3, tmp_path / "whole" / "checkpoints")]
    assert records[0].files == records[1].files
    events = (first_dir / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events] == ["started", "saved", "saved", "ended"]


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_job_that_was_replaced_while_it_slept_commits_nothing_and_says_so(tmp_path, place):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    job = waiting(run_dir, gate)
    job.send_signal(signal.SIGSTOP)
    there = {"token": "x", "pid": 7, "host": "far", "about": "run elsewhere"}
    (run_dir / place / RUN_LEASE).write_text(json.dumps(there))
    before = files(run_dir)
    gate.touch()
    job.send_signal(signal.SIGCONT)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == exit_codes.MISTAKE, output
    assert output.splitlines()[-1].startswith(
        f"{(run_dir / place).absolute()} was taken over by another job (process 7 on far, run else"
    )
    assert "Traceback" not in output
    after = files(run_dir)
    if place:  # the folder is its own: its lines are, too
        assert losses(run_dir)[-1][0] <= 12
        assert not (run_dir / "done.json").exists()
    else:
        assert after == before
    committed = [r.name for r in Checkpoints.at(str(run_dir / "checkpoints")).newest_first()[0]]
    assert committed == ["step-00000006"]
    assert json.loads((run_dir / place / RUN_LEASE).read_text()) == there


def test_a_supervisor_of_a_second_job_ends_at_once_and_restarts_nothing(tmp_path):
    run_dir = tmp_path / "run"
    with hold(LocalStore(run_dir), f"run {run_dir}", key=RUN_LEASE):
        before = sorted(run_dir.iterdir())
        process = start(launcher("torchrun"), run_dir, {})
        output = finish(process)
        assert process.returncode == exit_codes.MISTAKE, output
        assert "restart in" not in output
        said = [line for line in output.splitlines() if line.startswith("supervise: ")]
        assert len(said) == 1
        assert f"{run_dir} is being written by another job (process {os.getpid()} on" in said[0]
        assert sorted(run_dir.iterdir()) == before
