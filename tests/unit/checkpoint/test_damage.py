"""Runs whose bookkeeping is damaged go on, and one line a file says what was passed over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from tests.helpers import ROOT
from tests.unit.checkpoint.damage import KINDS, NAMES
from tests.unit.checkpoint.damage_job import STEPS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    env |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/unit/checkpoint/damage_job.py"), str(folder)],
        **{"env": env, "capture_output": True, "text": True, "timeout": 600},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def codes(runs: Path) -> dict[str, int]:
    return json.loads((runs / "codes.json").read_text())


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_damaged_files_continues_and_logs_it(runs, kind):
    assert codes(runs)[kind] == 0
    logged = (runs / f"{kind}.log").read_text().splitlines()
    for name in NAMES:
        path = str(runs / kind / name)
        lines = [line for line in logged if line.startswith((f"{path} ", f"{path}:"))]
        assert len(lines) in ((1, 2) if kind == "a folder" else (1,)), (name, logged)
    events = [row["event"] for row in rows(runs / kind / "events.jsonl")]
    assert events[-3:] == ["started", "saved", "ended"]
    assert json.loads((runs / kind / "done.json").read_text())["step"] == STEPS
    before = rows(runs / "base" / "metrics.jsonl")
    after = rows(runs / kind / "metrics.jsonl") if (runs / kind / "metrics.jsonl").exists() else []
    assert after == (before if KINDS[kind][0] is not None else [])


def test_damaged_files_make_no_second_run_in_mlflow(runs):
    client = mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")
    found = client.search_runs(["1"])
    assert [run.info.status for run in found] == ["FINISHED"]
    history = client.get_metric_history(found[0].info.run_id, "loss")
    assert len(history) == STEPS


def test_an_export_that_is_gone_is_made_anew_from_the_checkpoint(runs):
    assert codes(runs)["exported"] == 0
    for name in ("model.safetensors", "config.json", "README.md"):
        new, old = (runs / run / "export" / name for run in ("exported", "base"))
        wanted = old.read_bytes().replace(b"/base", b"/exported")
        assert new.read_bytes() == wanted, name
    logged = (runs / "exported.log").read_text().splitlines()
    anew = f": made again from step-{STEPS:08d}"
    assert len([line for line in logged if line.endswith(anew)]) == 2


def test_with_tracking_false_nothing_is_written_for_it(runs):
    assert codes(runs)["untracked"] == 0
    assert not (runs / "untracked.log").read_text()
    assert [p.name for p in (runs / "untracked").iterdir() if "tracking" in p.name] == []


def test_without_mlflow_a_run_ends_and_leaves_no_tracking_file(runs):
    assert codes(runs)["uninstalled"] == 0
    assert [p.name for p in (runs / "uninstalled").iterdir() if "tracking" in p.name] == []
    (logged,) = (runs / "uninstalled.log").read_text().splitlines()
    assert logged.startswith("tracking is off: mlflow cannot be imported")
