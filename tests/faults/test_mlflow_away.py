"""A real MLflow server is killed and restarted: nothing blocks, nothing is lost or duplicated."""

import logging

import pytest

from mdm.utils.tracking import MlflowTracker
from tests.faults.mlflow_server import MlflowServer
from tests.faults.proxy import FaultProxy
from tests.unit.utils.test_tracking import log_event, log_metrics, steps_of, take_all

pytestmark = pytest.mark.chaos


def test_what_waits_is_delivered_after_job_and_server_restart(tmp_path, s3_server, caplog):
    import mlflow

    caplog.set_level(logging.WARNING)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "note.txt").write_text("hello")
    params = {"train.lr": 0.1}
    with MlflowServer(tmp_path / "server", "s3://test/mlflow", s3_server.env) as server:
        first = MlflowTracker(run_dir, "outage", "job", params=params, uri=server.uri)
        log_metrics(run_dir, 1)
        take_all(first)
        server.kill()
        for step in range(2, 200):
            log_metrics(run_dir, step, loss=1.0 / step)
        log_event(run_dir, **{"notes/note.txt": "note.txt"})
        log_event(run_dir, **{"checkpoints/step-00000005.json": {"uri": "s3://x/y"}})
        first.finish("KILLED", timeout=1.0)
        assert first.waiting > 0
        assert "wait for the next attempt" in caplog.text

        server.start()
        path = run_dir / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(rows[:149]))  # steps 150 to 199 are repeated
        second = MlflowTracker(run_dir, "outage", "job", params=params, uri=server.uri)
        for step in range(150, 251):
            log_metrics(run_dir, step, loss=1.0 / step)
        second.finish("FINISHED", timeout=120)
        assert second.waiting == 0

        client = mlflow.MlflowClient(tracking_uri=server.uri)
        assert steps_of(client, first.run_id) == list(range(1, 251))
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
            run_dir = tmp_path / str(seed)
            run_dir.mkdir()
            with FaultProxy(server.port, 0.3, ("reset",), seed) as proxy:
                tracker = MlflowTracker(
                    run_dir, "cut", f"job {seed}", params={"seed": seed}, uri=proxy.endpoint
                )
                for step in range(5):
                    log_metrics(run_dir, step)
                tracker.finish(timeout=120)
                assert tracker.waiting == 0
        client = mlflow.MlflowClient(tracking_uri=server.uri)
        runs = client.search_runs([client.get_experiment_by_name("cut").experiment_id])
        assert sorted(run.info.run_name for run in runs) == ["job 0", "job 1"]
        for run in runs:
            assert run.info.status == "FINISHED"
            assert steps_of(client, run.info.run_id) == list(range(5))
