"""Against real MLflow stores: SQLite, and a server that is not there."""

import logging
import socket
import time

import pytest

from mdm.tracking import MlflowTracker, NullTracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri):
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


def test_one_run_across_attempts_without_duplicate_steps(uri, client, tmp_path):
    started = []
    first = MlflowTracker("demo", "job", uri=uri, on_start=started.append)
    first.log_params({"train.lr": 0.1, "seed": 1})
    for step in (64, 128, 192):
        first.log_metrics({"loss": 1.0 / step, "image_text/rec_img": 2.0}, step=step)
    note = tmp_path / "note.txt"
    note.write_text("hello")
    first.log_artifact(note, "notes")
    child = first.child("samples")
    child.log_metrics({"accuracy": 0.5}, step=64)
    child.finish()
    first.finish("KILLED", timeout=120)
    run_id = first.run_id
    assert started == [run_id]
    assert client.get_run(run_id).info.status == "KILLED"

    second = MlflowTracker("demo", "job", run_id=run_id, uri=uri)
    second.log_params({"train.lr": 0.1, "seed": 1})
    for step in (128, 192, 256):  # 128 and 192 are done again after a kill
        second.log_metrics({"loss": 1.0 / step}, step=step)
    second.finish("FINISHED", timeout=120)

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.lr": "0.1", "seed": "1"}
    history = client.get_metric_history(run_id, "loss")
    assert sorted(m.step for m in history) == [64, 128, 192, 256]
    assert [a.path for a in client.list_artifacts(run_id, "notes")] == ["notes/note.txt"]
    below = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    assert [b.info.run_name for b in below] == ["samples"]


def test_server_away_neither_blocks_nor_raises(caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = "hunter2"
    caplog.set_level(logging.WARNING)
    tracker = MlflowTracker("demo", "job", uri=f"http://me:{secret}@127.0.0.1:{port}")
    began = time.perf_counter()
    for step in range(20_000):  # more than the queue holds
        tracker.log_metrics({"loss": 1.0}, step=step)
    assert time.perf_counter() - began < 60  # none of them waits for an answer
    began = time.perf_counter()
    tracker.finish("FAILED", timeout=3)
    assert time.perf_counter() - began < 15
    messages = [r.getMessage() for r in caplog.records if r.name == "mdm"]
    assert 1 <= len(messages) <= 2
    assert secret not in " ".join(messages)
    assert tracker.run_id is None


def test_null_tracker_has_the_same_methods():
    tracker = NullTracker()
    tracker.log_params({"a": 1})
    tracker.log_metrics({"a": 1.0}, step=1)
    tracker.child("x").finish()
    assert tracker.run_id is None
