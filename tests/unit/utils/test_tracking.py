"""Against real MLflow stores: SQLite, and a server that is not there."""

import logging
import math
import socket
import sys
import time
from pathlib import Path

import pytest
from mlflow.entities import ViewType

from mdm.utils.tracking import MlflowTracker, NullTracker, read_key


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


def take_all(tracker: MlflowTracker) -> None:
    """Return once the store has taken what waits."""
    end = time.monotonic() + 60
    while tracker.waiting and time.monotonic() < end:
        time.sleep(0.02)
    assert not tracker.waiting


def runs_of(client, experiment: str) -> list:
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], run_view_type=ViewType.ALL)


def steps_of(client, run_id: str, key: str = "loss") -> list[int]:
    return sorted(m.step for m in client.get_metric_history(run_id, key))


def remove_for_good(uri: str, run_id: str) -> None:
    """As `mlflow gc` does."""
    from mlflow.tracking._tracking_service.utils import _get_store

    _get_store(uri)._hard_delete_run(run_id)


def test_a_deleted_experiment_is_restored(uri, client, caplog):
    client.delete_experiment(client.create_experiment("deleted"))
    tracker = MlflowTracker("deleted", "job", uri=uri)
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "deleted")
    assert run.info.status == "FINISHED"
    assert client.get_experiment_by_name("deleted").lifecycle_stage == "active"
    assert steps_of(client, run.info.run_id) == [1]
    assert "'deleted' was deleted: it is restored" in caplog.text


def test_an_experiment_that_cannot_be_has_another_name(uri, client, caplog):
    tracker = MlflowTracker("x" * 600, "job", uri=uri)
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "x" * 400 + "-2")
    assert run.info.status == "FINISHED"
    assert "cannot be used" in caplog.text


def test_an_id_that_cannot_be_noted_makes_no_further_runs(uri, client):
    heard = []

    def full_disk(run_id: str) -> None:
        heard.append(run_id)
        if len(heard) < 4:
            raise OSError(28, "No space left on device")

    tracker = MlflowTracker("full", "job", uri=uri, on_start=full_disk)
    for step in range(8):
        tracker.log_metrics({"loss": 1.0}, step=step)
        take_all(tracker)
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "full")
    assert heard == 4 * [run.info.run_id]
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == list(range(8))


def test_a_run_whose_id_was_lost_with_a_kill_is_found_again(uri, client, tmp_path):
    first = MlflowTracker("killed", "job", uri=uri, journal=tmp_path)
    first.log_metrics({"loss": 1.0}, step=1)
    take_all(first)  # and now it is killed: its run is RUNNING
    second = MlflowTracker("killed", "job", uri=uri, journal=tmp_path)
    second.log_metrics({"loss": 1.0}, step=2)
    second.finish(timeout=60)
    (run,) = runs_of(client, "killed")
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == [1, 2]
    first.finish(timeout=60)


@pytest.mark.parametrize("data", [b"", bytes(32), b"\xff", b"0123", b"[]"])
def test_a_damaged_key_is_passed_over(uri, client, tmp_path, caplog, data):
    name = f"key {data!r}"
    first = MlflowTracker(name, "job", uri=uri, journal=tmp_path)
    take_all(first)
    first.finish("KILLED", timeout=60)
    (tmp_path / "key").write_bytes(data)
    MlflowTracker(name, "job", run_id=first.run_id, uri=uri, journal=tmp_path).finish(timeout=60)
    (run,) = runs_of(client, name)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mdm.key"] == read_key(tmp_path) != ""
    assert f"{tmp_path}/key is damaged" in caplog.text


@pytest.mark.parametrize("what", ["run", "experiment"])
@pytest.mark.parametrize("when", ["while it runs", "before it goes on"])
def test_what_was_deleted_is_restored(uri, client, tmp_path, caplog, what, when):
    name = f"{what} {when}"
    first = MlflowTracker(name, "job", uri=uri, journal=tmp_path)
    first.log_metrics({"loss": 1.0}, step=1)
    take_all(first)
    if when == "before it goes on":
        first.finish("KILLED", timeout=60)
    if what == "run":
        client.delete_run(first.run_id)
    else:
        client.delete_experiment(client.get_experiment_by_name(name).experiment_id)
    last = first
    if when == "before it goes on":
        last = MlflowTracker(name, "job", run_id=first.run_id, uri=uri, journal=tmp_path)
    last.log_params({"seed": 1})
    last.log_metrics({"loss": 1.0}, step=2)
    last.finish(timeout=60)
    (run,) = runs_of(client, name)
    assert (run.info.status, run.info.lifecycle_stage) == ("FINISHED", "active")
    assert steps_of(client, run.info.run_id) == [1, 2]
    assert run.data.params == {"seed": "1"}
    assert "was deleted: it is restored" in caplog.text


@pytest.mark.parametrize("when", ["while it runs", "before it goes on"])
def test_a_run_that_is_gone_for_good_has_a_new_one_with_all_entries(uri, client, tmp_path, when):
    name, heard = f"gone {when}", []
    first = MlflowTracker(name, "job", uri=uri, journal=tmp_path, on_start=heard.append)
    first.log_params({"seed": 1})
    first.log_metrics({"loss": 1.0}, step=1)
    take_all(first)
    gone = first.run_id
    if when == "before it goes on":
        first.finish("KILLED", timeout=60)
    client.delete_run(gone)
    remove_for_good(uri, gone)
    last = first
    if when == "before it goes on":
        last = MlflowTracker(
            name, "job", run_id=gone, uri=uri, journal=tmp_path, on_start=heard.append
        )
    last.log_metrics({"loss": 1.0}, step=2)
    last.finish(timeout=60)
    (run,) = runs_of(client, name)
    assert run.info.run_id not in (gone, None)
    assert heard == [gone, run.info.run_id]
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == [1, 2]
    assert run.data.params == {"seed": "1"}


def test_what_the_store_refuses_is_dropped_alone(uri, client, tmp_path, caplog):
    tracker = MlflowTracker("refused", "job", uri=uri, journal=tmp_path / "journal")
    bad = {"a=b": "1", "k" * 300: "2", "../up": "3"}
    tracker.log_params({f"p{i}": i for i in range(150)} | bad | {"ok": "\udce9"})
    for step in range(3):
        values = {f"m{i}": float(step) for i in range(1200 if step == 1 else 2)}
        tracker.log_metrics(values | {"n=1": 1.0, "nan": math.nan, "inf": math.inf}, step=step)
    tracker.log_text("no", "../../outside.txt")
    tracker.log_artifact(tmp_path / "never")
    tracker._put({"kind": "metrics", "metrics": {"m1": 1.0}, "step": 2**70, "time": 1})
    tracker._put({"kind": "metrics", "metrics": {"m1": [1]}, "step": 4, "time": 1})
    tracker._put({"kind": "metrics", "metrics": 5, "step": 5, "time": 1})
    tracker._put({"kind": "metrics", "metrics": {"m1": 10**400}, "step": 6, "time": 1})
    tracker.log_artifact("/" + "x" * 5000)
    tracker.log_text("no", "y" * 5000)
    tracker._put({"kind": "other"})
    tracker.log_text("yes", "notes/note.txt")
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "refused")
    assert run.info.status == "FINISHED"
    assert set(run.data.params) == {f"p{i}" for i in range(150)} | {"ok"}
    assert steps_of(client, run.info.run_id, "m1") == [0, 1, 2]
    assert steps_of(client, run.info.run_id, "m1199") == [1]
    assert steps_of(client, run.info.run_id, "nan") == [0, 1, 2]
    assert steps_of(client, run.info.run_id, "inf") == [0, 1, 2]
    assert [a.path for a in client.list_artifacts(run.info.run_id, "notes")] == ["notes/note.txt"]
    said = [r.getMessage() for r in caplog.records if r.name == "mdm"]
    for name in (*bad, "n=1", "outside.txt"):
        assert sum(f"{name}" in line for line in said) == 1, name


def test_a_run_that_a_killed_job_left_is_closed(uri, client, tmp_path):
    left = MlflowTracker("left", "first", uri=uri, journal=tmp_path / "first")
    known = MlflowTracker("left", "second", uri=uri, journal=tmp_path / "second")
    take_all(left)
    ended = time.monotonic() + 60
    while (left.run_id is None or known.run_id is None) and time.monotonic() < ended:
        time.sleep(0.02)
    new = MlflowTracker("left", "new", uri=uri, journal=tmp_path / "third")
    new.end_former("", read_key(tmp_path / "first"))
    new.end_former(known.run_id, "")
    new.end_former("0" * 32, "")
    new.finish(timeout=60)
    found = {run.info.run_name: run.info.status for run in runs_of(client, "left")}
    assert found == {"first": "KILLED", "second": "KILLED", "new": "FINISHED"}
    left.finish(timeout=60)
    known.finish(timeout=60)


def test_without_mlflow_nothing_waits(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # importing it raises ModuleNotFoundError
    tracker = MlflowTracker("none", "job", uri=f"sqlite:///{tmp_path}/m.db", journal=tmp_path / "j")
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step=step)
    tracker.finish(timeout=60)
    assert not tracker.waiting
    assert list(tmp_path.iterdir()) == []
    (said,) = [r.getMessage() for r in caplog.records if r.name == "mdm"]
    assert "tracking is off" in said
    assert "--no_tracking" in said


def test_an_outage_in_the_middle_costs_nothing_and_shows_no_stack_trace(
    uri, client, tmp_path, capfd
):
    store = Path(uri.removeprefix("sqlite:///"))
    tracker = MlflowTracker("away", "job", uri=uri, journal=tmp_path)
    tracker.log_metrics({"loss": 1.0}, step=1)
    take_all(tracker)
    store.rename(tmp_path / "away.db")
    tracker.log_metrics({"loss": 1.0}, step=2)
    time.sleep(1.0)
    assert tracker.waiting
    (tmp_path / "away.db").rename(store)
    tracker.finish(timeout=60)
    assert steps_of(client, tracker.run_id) == [1, 2]
    assert "Traceback" not in capfd.readouterr().err
