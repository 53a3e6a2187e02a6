"""`pretrain.py --preflight` on real ranks, against a real S3 server and against none."""

import os
import re

import pytest

from mdm.planning.preflight import judge_rates
from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.distributed
FLAGS = ("--preset", "demo", "--preflight", "true", "--train.threads", "1")


def lines(output: str) -> dict[str, str]:
    """Check -> its whole line."""
    rows = [line for line in output.splitlines() if line.startswith(("ok ", "FAILED "))]
    return {re.split(r"\s{2,}", row)[1]: row for row in rows}


def test_all_is_well(tmp_path, s3):
    flags = (*FLAGS, "--data.root", s3, "--run_dir", str(tmp_path / "run"))
    code, output = run_ranks(ROOT / "pipelines/pretrain.py", 2, *flags)
    found = lines(output)
    assert len(found) == 7, output
    for name, row in found.items():
        assert row.startswith("ok") or name.startswith("slow"), row
    assert code == (0 if found["slow nodes"].startswith("ok") else 1)
    assert "over 2 ranks" in found["all-reduce"]
    assert not list((tmp_path / "run").rglob("*-*"))  # the probes are gone


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_slow_rank_and_missing_storage_are_named(tmp_path, s3):
    flags = (*FLAGS, "--data.root", "s3://nowhere/data", "--run_dir", str(tmp_path))
    code, output = run_ranks(ROOT / "tests/distributed/slow_rank.py", 2, *flags)
    found = lines(output)
    assert code != 0
    assert "rank 1 on " in found["slow nodes"], output
    assert found["slow nodes"].startswith("FAILED")
    storage = found["storage s3://nowhere/data"]
    assert storage.startswith("FAILED"), storage
    assert "rank 0: " in storage
    assert "rank 1: " in storage


def test_rates_are_judged_by_the_median():
    rates = [(1.0e12, "a"), (0.95e12, "b"), (0.5e12, "c"), (1.1e12, "d")]
    check = judge_rates(rates)
    assert not check.passed
    assert check.detail == "median 1.000 TFLOP/s a rank; rank 2 on c reaches 50% of that"
    assert judge_rates(rates[:2]).passed
