"""`pretrain.py --preflight` on real ranks, with a real S3 server and with a missing bucket."""

import os
import re

import pytest

from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.distributed
FLAGS = ("--preset", "demo", "--preflight", "--train.threads", "1")


def checks_of(output: str) -> dict[str, str]:
    """The line of the table for each check, by name."""
    rows = [line for line in output.splitlines() if line.startswith(("ok ", "WARNING ", "FAILED "))]
    return {re.split(r"\s{2,}", row)[1]: row for row in rows}


def test_all_checks_pass_on_a_healthy_machine(tmp_path, s3):
    flags = (*FLAGS, "--data.root", s3, "--run_dir", str(tmp_path / "run"))
    code, output = run_ranks(ROOT / "pipelines/pretrain.py", 2, *flags)
    checks = checks_of(output)
    assert len(checks) == 8, output
    for name, row in checks.items():
        assert row.startswith("ok") or name.startswith("slow"), row
    assert code == (0 if checks["slow nodes"].startswith("ok") else 1)
    assert "over 2 ranks" in checks["all-reduce"]
    assert not list((tmp_path / "run").rglob("*-*"))  # the probe files are removed


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_preflight_names_a_slow_rank_and_missing_storage(tmp_path, s3):
    flags = (*FLAGS, "--data.root", "s3://nowhere/data", "--run_dir", str(tmp_path))
    code, output = run_ranks(ROOT / "tests/distributed/slow_rank.py", 2, *flags)
    checks = checks_of(output)
    assert code != 0
    assert "rank 1 on " in checks["slow nodes"], output
    assert checks["slow nodes"].startswith("FAILED")
    storage = checks["storage s3://nowhere/data"]
    assert storage.startswith("FAILED"), storage
    assert "rank 0: " in storage
    assert "rank 1: " in storage
