"""A real MLflow server dies and returns: nothing blocks, nothing is lost or duplicated."""

import logging
import time

import pytest

from mdm.utils.tracking import MlflowTracker
from tests.faults.mlflow_server import MlflowServer
from tests.faults.proxy import FaultProxy

pytestmark = pytest.mark.chaos


def test_waiting_entries_are_delivered_after_job_and_server_restart(tmp_path, s3_server, caplog):
    import mlflow

    caplog.set_level(logging.WARNING)
    artifacts, journal = "s3://test/mlflow", tmp_path / "run" / "tracking"
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with MlflowServer(tmp_path / "server", artifacts, s3_server.env) as server:
        first = MlflowTracker("outage", "job", uri=server.uri, journal=journal)
        first.log_params({"train.lr": 0.1})
        first.log_metrics({"loss": 1.0}, step=1)
        end = time.monotonic() + 120
        while first.waiting and time.monotonic() < end:
            time.sleep(0.1)
        assert first.waiting == 0
        server.kill()
        began = time.perf_counter()
        for step in range(2, 200):
            first.log_metrics({"loss": 1.0 / step}, step=step)
        first.log_artifact(note, "notes")
        first.log_text('{"uri": "s3://x/y"}', "checkpoints/step-00000005.json")
        assert time.perf_counter() - began < 2  # no call waits for the server
        first.finish("KILLED", timeout=1.0)
        assert first.waiting > 0
        assert "wait for the next attempt" in caplog.text

        server.start()
        second = MlflowTracker(
            "outage", "job", run_id=first.run_id, uri=server.uri, journal=journal
        )
        for step in range(150, 251):  # steps 150 to 199 are repeated
            second.log_metrics({"loss": 1.0 / step}, step=step)
        second.finish("FINISHED", timeout=120)
        assert second.waiting == 0

        client = mlflow.MlflowClient(tracking_uri=server.uri)
        history = client.get_metric_history(first.run_id, "loss")
        assert [m.step for m in sorted(history, key=lambda m: m.step)] == list(range(1, 251))
        run = client.get_run(first.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"train.lr": "0.1"}
        artifacts_logged = {
            a.path
            for f in ("notes", "checkpoints")
            for a in client.list_artifacts(run.info.run_id, f)
        }
        assert artifacts_logged == {"notes/note.txt", "checkpoints/step-00000005.json"}


def test_lost_responses_do_not_create_a_second_run(tmp_path):
    """Connections are reset before or after the server handles a request, at start-up as well."""
    import mlflow

    with MlflowServer(tmp_path / "server") as server:
        for seed in range(2):
            with FaultProxy(server.port, 0.3, ("reset",), seed) as proxy:
                tracker = MlflowTracker(
                    "cut", f"job {seed}", uri=proxy.endpoint, journal=tmp_path / str(seed)
                )
                tracker.log_params({"seed": seed})
                for step in range(5):
                    tracker.log_metrics({"loss": 1.0}, step=step)
                tracker.finish(timeout=120)
                assert tracker.waiting == 0
        client = mlflow.MlflowClient(tracking_uri=server.uri)
        runs = client.search_runs([client.get_experiment_by_name("cut").experiment_id])
        assert sorted(run.info.run_name for run in runs) == ["job 0", "job 1"]
        for run in runs:
            assert run.info.status == "FINISHED"
            history = client.get_metric_history(run.info.run_id, "loss")
            assert [m.step for m in history] == list(range(5))
