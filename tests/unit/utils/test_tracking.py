"""Delivery of a run's files to real MLflow stores: SQLite, and a server that is down."""

import json
import logging
import math
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType

from mdm.utils import files
from mdm.utils.progress import Progress, adopt_old_journal, unsent_bytes, unsent_lines
from mdm.utils.tracking import MlflowTracker, NullTracker, log_result


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri):
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


def track(folder: Path, uri: str, experiment: str, **settings: Any) -> MlflowTracker:
    return MlflowTracker(folder, experiment, "job", uri=uri, **({"params": {}} | settings))


def log_metrics(folder: Path, step: int, **values: Any) -> None:
    row = {"step": step, "samples_seen": step, **(values or {"loss": 1.0}), "time": time.time()}
    files.append_line(folder / "metrics.jsonl", row)


def log_event(folder: Path, **artifacts: Any) -> None:
    row = {"event": "saved", "step": 1, "time": 1.0, "artifacts": artifacts}
    files.append_line(folder / "events.jsonl", row)


def test_one_run_across_attempts_without_duplicate_steps(uri, client, tmp_path):
    first = track(tmp_path, uri, "demo", params={"train.lr": 0.1, "seed": 1})
    for step in (64, 128, 192):
        log_metrics(tmp_path, step, loss=1.0 / step, **{"image_text/rec_img": 2.0})
    (tmp_path / "note.txt").write_text("hello")
    log_event(tmp_path, **{"notes/note.txt": "note.txt", "checkpoints/64.json": {"step": 64}})
    first.finish("KILLED", timeout=120)
    run_id = first.run_id
    assert Progress.read(tmp_path).run_id == run_id
    assert client.get_run(run_id).info.status == "KILLED"

    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(rows[0])  # the others are repeated after a kill
    second = track(tmp_path, uri, "demo", params={"train.lr": 0.2, "seed": 1})
    for step in (128, 192, 256):
        log_metrics(tmp_path, step, loss=1.0 / step)
    second.finish("FINISHED", timeout=120)

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.lr": "0.1", "seed": "1"}
    history = client.get_metric_history(run_id, "loss")
    assert sorted(m.step for m in history) == [64, 128, 192, 256]
    assert steps_of(client, run_id, "image_text/rec_img") == [64, 128, 192]
    assert set(run.data.metrics) == {"loss", "image_text/rec_img"}
    assert [a.path for a in client.list_artifacts(run_id, "notes")] == ["notes/note.txt"]
    path = client.download_artifacts(run_id, "checkpoints/64.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == {"step": 64}


def test_the_result_of_a_short_job_is_recorded_below_a_run(uri, client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    parent = track(tmp_path, uri, "result")
    take_all(parent)
    parent.finish()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sheet.png").write_bytes(b"png")
    log_result(
        "result",
        "evaluate",
        parent=parent.run_id,
        params={"steps": 8},
        metrics=[({"accuracy": 0.5}, 64), ({"accuracy": 0.75}, 128)],
        artifacts={"evaluation": str(tmp_path / "out")},
    )
    experiment = client.get_experiment_by_name("result").experiment_id
    tag = f"tags.mlflow.parentRunId = '{parent.run_id}'"
    (child,) = client.search_runs([experiment], tag)
    assert (child.info.run_name, child.info.status) == ("evaluate", "FINISHED")
    assert child.data.params == {"steps": "8"}
    assert steps_of(client, child.info.run_id, "accuracy") == [64, 128]
    artifacts = client.list_artifacts(child.info.run_id, "evaluation")
    assert [a.path for a in artifacts] == ["evaluation/sheet.png"]


def test_a_server_that_is_down_neither_blocks_nor_raises(tmp_path, caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = "hunter2"
    caplog.set_level(logging.WARNING)
    tracker = track(tmp_path, f"http://me:{secret}@127.0.0.1:{port}", "demo")
    log_metrics(tmp_path, 1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    began = time.perf_counter()
    tracker.finish("FAILED", timeout=3)
    assert time.perf_counter() - began < 15
    messages = [r.getMessage() for r in caplog.records if r.name == "mdm"]
    assert 1 <= len(messages) <= 2
    assert f"{size} bytes of metrics and events wait for the next attempt" in messages[-1]
    assert secret not in " ".join(messages)
    assert not tracker.run_id


def test_the_null_tracker_has_no_run():
    tracker = NullTracker()
    tracker.finish("FAILED")
    assert not tracker.run_id


def take_all(tracker: MlflowTracker) -> None:
    """Return once the store has received what waits."""
    end = time.monotonic() + 60
    while (tracker.waiting or not tracker.run_id) and time.monotonic() < end:
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


def test_a_deleted_experiment_is_restored(uri, client, tmp_path, caplog):
    client.delete_experiment(client.create_experiment("deleted"))
    log_metrics(tmp_path, 1)
    track(tmp_path, uri, "deleted").finish(timeout=60)
    (run,) = runs_of(client, "deleted")
    assert run.info.status == "FINISHED"
    assert client.get_experiment_by_name("deleted").lifecycle_stage == "active"
    assert steps_of(client, run.info.run_id) == [1]
    assert "'deleted' was deleted: it is restored" in caplog.text


def test_an_experiment_that_the_store_refuses_gets_another_name(uri, client, tmp_path, caplog):
    track(tmp_path, uri, "x" * 600).finish(timeout=60)
    (run,) = runs_of(client, "x" * 400 + "-2")
    assert run.info.status == "FINISHED"
    assert "cannot be used" in caplog.text


def test_an_id_that_cannot_be_written_creates_no_further_runs(uri, client, tmp_path, monkeypatch):
    written = []

    def fill_disk(path: Path, value: dict[str, Any]) -> None:
        written.append(value["run_id"])
        if 1 < len(written) < 5:
            raise OSError(28, "No space left on device")
        path.write_text(json.dumps(value))

    monkeypatch.setattr(files, "write_json", fill_disk)
    tracker = track(tmp_path, uri, "full")
    for step in range(8):
        log_metrics(tmp_path, step)
        take_all(tracker)
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "full")
    assert written[:2] == ["", run.info.run_id]
    assert len(written) > 5
    assert Progress.read(tmp_path).run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == list(range(8))


def test_a_run_whose_id_was_lost_with_a_kill_is_found_again(uri, client, tmp_path):
    killed, folder = tmp_path / "killed", tmp_path / "run"
    killed.mkdir()
    folder.mkdir()
    first = track(killed, uri, "killed")
    log_metrics(killed, 1)
    take_all(first)  # and now it is killed: its run is RUNNING
    note = json.loads((killed / "tracking.json").read_text())
    note |= {"run_id": "", "metrics": [0, 0, 0]}  # as it was before the run was created
    (folder / "tracking.json").write_text(json.dumps(note))
    log_metrics(folder, 1)
    log_metrics(folder, 2)
    track(folder, uri, "killed").finish(timeout=60)
    (run,) = runs_of(client, "killed")
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == [1, 2]
    first.finish(timeout=60)


@pytest.mark.parametrize("data", [b"", bytes(32), b"\xff", b'{"run_id": 5}', b"[]"])
def test_a_damaged_tracking_file_creates_no_second_run(uri, client, tmp_path, caplog, data):
    name = f"damaged {data!r}"
    first = track(tmp_path, uri, name)
    identities = [first.identity]  # the key, as long as the store has not answered
    log_metrics(tmp_path, 1)
    first.finish("KILLED", timeout=60)
    identities.append(first.identity)
    assert identities == [Progress.read(tmp_path).key, first.run_id]
    for identity in identities:  # a checkpoint has one of them
        (tmp_path / "tracking.json").write_bytes(data)
        track(tmp_path, uri, name, identity=identity).finish("KILLED", timeout=60)
    log_metrics(tmp_path, 2)
    track(tmp_path, uri, name).finish(timeout=60)
    (run,) = runs_of(client, name)
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == [1, 2]
    assert run.data.tags["mdm.key"] == Progress.read(tmp_path).key
    assert f"{tmp_path}/tracking.json is damaged" in caplog.text


@pytest.mark.parametrize(
    "position", [None, 5, [1], [1, 2, "3"], [-1, 5, 3], [9**9, 5, 3], [1, 1, 1]]
)
def test_a_wrong_position_sends_nothing_twice_and_misses_nothing(uri, client, tmp_path, position):
    name = f"position {position}"
    first = track(tmp_path, uri, name)
    log_metrics(tmp_path, 1)
    first.finish("KILLED", timeout=60)
    note = json.loads((tmp_path / "tracking.json").read_text())
    assert note["metrics"][0] == (tmp_path / "metrics.jsonl").stat().st_size
    (tmp_path / "tracking.json").write_text(json.dumps(note | {"metrics": position}))
    log_metrics(tmp_path, 2)
    track(tmp_path, uri, name).finish(timeout=60)
    (run,) = runs_of(client, name)
    assert steps_of(client, run.info.run_id) == [1, 2]


@pytest.mark.parametrize("tail", [b'{"step": 9, "x', bytes(99), b"\xff\n", b"[]\n", b"5", b"{}\n"])
def test_damaged_lines_are_skipped_and_nothing_else(uri, client, tmp_path, tail):
    name = f"lines {tail!r}"
    for step in (1, 2):
        log_metrics(tmp_path, step)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    tracker = track(tmp_path, uri, name)
    for step in (3, 4):
        log_metrics(tmp_path, step)
    tracker.finish(timeout=60)
    assert not tracker.waiting
    (run,) = runs_of(client, name)
    assert steps_of(client, run.info.run_id) == [1, 2, 3, 4]


def test_a_rewritten_file_is_sent_completely(uri, client, tmp_path):
    """A rollback: the file is shorter while the job runs, and grows past its former size."""
    tracker = track(tmp_path, uri, "rewritten")
    for step in (1, 2, 3, 4):
        log_metrics(tmp_path, step)
    take_all(tracker)
    path = tmp_path / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows.insert(1, json.dumps({"samples_seen": 2, "time": 1.0, "lr": 0.5}) + "\n")
    path.write_text("".join(rows[:3]))
    for step in (3, 4, 5):
        log_metrics(tmp_path, step)
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "rewritten")
    assert steps_of(client, run.info.run_id) == [1, 2, 3, 4, 5]
    assert steps_of(client, run.info.run_id, "lr") == [2]


@pytest.mark.parametrize("what", ["run", "experiment"])
@pytest.mark.parametrize("when", ["while it runs", "before it goes on"])
def test_what_was_deleted_is_restored(uri, client, tmp_path, caplog, what, when):
    name = f"{what} {when}"
    first = track(tmp_path, uri, name, params={"seed": 1})
    log_metrics(tmp_path, 1)
    take_all(first)
    if when == "before it goes on":
        first.finish("KILLED", timeout=60)
    if what == "run":
        client.delete_run(first.run_id)
    else:
        client.delete_experiment(client.get_experiment_by_name(name).experiment_id)
    last = first
    if when == "before it goes on":
        last = track(tmp_path, uri, name, params={"seed": 1})
    log_metrics(tmp_path, 2)
    last.finish(timeout=60)
    (run,) = runs_of(client, name)
    assert (run.info.status, run.info.lifecycle_stage) == ("FINISHED", "active")
    assert steps_of(client, run.info.run_id) == [1, 2]
    assert run.data.params == {"seed": "1"}
    assert "was deleted: it is restored" in caplog.text


@pytest.mark.parametrize("when", ["while it runs", "before it goes on"])
def test_a_run_that_is_gone_for_good_is_replaced_by_one_with_everything(
    uri, client, tmp_path, when
):
    name = f"gone {when}"
    first = track(tmp_path, uri, name, params={"seed": 1})
    log_metrics(tmp_path, 1)
    log_event(tmp_path, **{"notes/1.json": {}})
    take_all(first)
    gone = first.run_id
    if when == "before it goes on":
        first.finish("KILLED", timeout=60)
    client.delete_run(gone)
    remove_for_good(uri, gone)
    last = first
    if when == "before it goes on":
        last = track(tmp_path, uri, name, params={"seed": 1})
    log_metrics(tmp_path, 2)
    last.finish(timeout=60)
    (run,) = runs_of(client, name)
    assert run.info.run_id not in (gone, None)
    assert Progress.read(tmp_path).run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    assert steps_of(client, run.info.run_id) == [1, 2]
    assert run.data.params == {"seed": "1"}
    artifacts = client.list_artifacts(run.info.run_id, "notes")
    assert [a.path for a in artifacts] == ["notes/1.json"]


def test_what_the_store_refuses_is_dropped_alone(uri, client, tmp_path, caplog):
    bad = {"a=b": "1", "k" * 300: "2", "../up": "3"}
    params = {f"p{i}": i for i in range(150)} | bad | {"ok": "\udce9"}
    tracker = track(tmp_path, uri, "refused", params=params)
    for step in range(3):
        values = {f"m{i}": float(step) for i in range(1200 if step == 1 else 2)}
        log_metrics(tmp_path, step, **values, **{"n=1": 1.0, "nan": math.nan, "inf": math.inf})
    log_metrics(tmp_path, 2**70, m1=1.0)
    log_metrics(tmp_path, 4, m1=[1])
    log_metrics(tmp_path, 5, m1="5")
    log_metrics(tmp_path, 6, m1=10**400)
    log_event(tmp_path, **{"../../outside.txt": {}, "never": "never"})
    log_event(tmp_path, **{"long": "/" + "x" * 5000, "y" * 5000: {}})
    files.append_line(tmp_path / "events.jsonl", {"event": "other", "artifacts": 5})
    log_event(tmp_path, **{"notes/note.json": {}})
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "refused")
    assert run.info.status == "FINISHED"
    assert set(run.data.params) == {f"p{i}" for i in range(150)} | {"ok"}
    assert steps_of(client, run.info.run_id, "m1") == [0, 1, 2]
    assert steps_of(client, run.info.run_id, "m1199") == [1]
    assert steps_of(client, run.info.run_id, "nan") == [0, 1, 2]
    assert steps_of(client, run.info.run_id, "inf") == [0, 1, 2]
    assert [a.path for a in client.list_artifacts(run.info.run_id, "notes")] == ["notes/note.json"]
    warnings = [r.getMessage() for r in caplog.records if r.name == "mdm"]
    for name in (*bad, "n=1", "outside.txt"):
        assert sum(f"{name}" in line for line in warnings) == 1, name


def test_a_run_that_a_killed_job_left_is_closed(uri, client, tmp_path):
    trackers = {}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        trackers[name] = MlflowTracker(tmp_path / name, "left", name, params={}, uri=uri)
        take_all(trackers[name])
    keys = {name: Progress.read(tmp_path / name).key for name in trackers}
    former = [["", keys["first"]], [trackers["second"].run_id, ""], ["0" * 32, ""]]
    Progress(former=former).write(tmp_path)
    MlflowTracker(tmp_path, "left", "new", params={}, uri=uri).finish(timeout=60)
    statuses = {run.info.run_name: run.info.status for run in runs_of(client, "left")}
    assert statuses == {"first": "KILLED", "second": "KILLED", "new": "FINISHED"}
    assert Progress.read(tmp_path).former == []
    for tracker in trackers.values():
        tracker.finish(timeout=60)


def test_without_mlflow_nothing_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # importing it raises ModuleNotFoundError
    track(tmp_path, f"sqlite:///{tmp_path}/m.db", "none").finish(timeout=60)
    assert list(tmp_path.iterdir()) == []
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mdm"]
    assert "tracking is off" in line
    assert "--no_tracking" in line


def test_an_outage_in_the_middle_costs_nothing_and_shows_no_stack_trace(
    uri, client, tmp_path, capfd
):
    store = Path(uri.removeprefix("sqlite:///"))
    tracker = track(tmp_path, uri, "away")
    log_metrics(tmp_path, 1)
    take_all(tracker)
    store.rename(tmp_path / "away.db")
    log_metrics(tmp_path, 2)
    time.sleep(2.0)
    assert tracker.waiting
    (tmp_path / "away.db").rename(store)
    tracker.finish(timeout=60)
    assert steps_of(client, tracker.run_id) == [1, 2]
    assert "Traceback" not in capfd.readouterr().err


def write_old_journal(folder: Path, sent: int) -> None:
    """The files of a run that the version before began, with `sent` of 4 entries delivered."""
    (folder / "tracking").mkdir(parents=True)
    (folder / "image.png").write_bytes(b"png")
    entries = [
        {"kind": "metrics", "metrics": {"loss": 1.0}, "step": 1, "time": 1000},
        {"kind": "text", "text": '{"step": 1}', "path": "checkpoints/1.json"},
        {"kind": "artifact", "path": str(folder / "image.png"), "folder": "samples"},
        {"kind": "status", "status": "FINISHED"},
    ]
    lines = [json.dumps(entry) + "\n" for entry in entries]
    (folder / "tracking" / "journal.jsonl").write_text("".join(lines) + '{"kind": "te')
    (folder / "tracking" / "taken").write_text(str(len("".join(lines[:sent]))))
    (folder / "tracking" / "key").write_text("0123456789abcdef" * 2)
    log_metrics(folder, 1)
    row = {"event": "started", "step": 1, "time": 1.0, "seconds": 2.0}
    files.append_line(folder / "events.jsonl", row)


def test_what_waits_in_the_journal_of_the_version_before_is_sent(uri, client, tmp_path):
    write_old_journal(tmp_path, sent=0)
    adopt_old_journal(tmp_path)
    assert not (tmp_path / "tracking").exists()
    assert unsent_bytes(tmp_path, Progress.read(tmp_path)) > 0
    tracker = track(tmp_path, uri, "adopted")
    log_metrics(tmp_path, 2)
    tracker.finish(timeout=60)
    (run,) = runs_of(client, "adopted")
    assert run.data.tags["mdm.key"] == "0123456789abcdef" * 2
    assert steps_of(client, run.info.run_id) == [1, 2]
    artifacts = [
        artifact.path
        for folder in ("checkpoints", "samples")
        for artifact in client.list_artifacts(run.info.run_id, folder)
    ]
    assert artifacts == ["checkpoints/1.json", "samples/image.png"]


def test_an_old_journal_of_which_everything_was_sent_leaves_nothing_to_send(tmp_path):
    write_old_journal(tmp_path, sent=4)
    (tmp_path / "tracking.json").write_text(json.dumps({"run_id": "7", "config": "c"}))
    adopt_old_journal(tmp_path)
    progress = Progress.read(tmp_path)
    assert (progress.run_id, progress.config, progress.status) == ("7", "c", "FINISHED")
    assert unsent_bytes(tmp_path, progress) == 0


def test_a_line_that_is_still_being_written_is_sent_once_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"samples_seen": 1}\n{"samples')
    ((_, position),) = unsent_lines(path, Progress().metrics, {})
    with path.open("ab") as file:
        file.write(b'_seen": 2}\n')
    ((row, position),) = unsent_lines(path, position, {})
    assert row == {"samples_seen": 2}
    assert position.end == path.stat().st_size
