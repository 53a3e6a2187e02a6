"""What a finished run still sends to MLflow when its command is run again."""

import mlflow
import pytest

from mdm.checkpoint.state import TrainState
from mdm.train import outcome
from mdm.utils.progress import Progress
from mdm.utils.saved_config import fingerprint
from tests.helpers import small_config
from tests.unit.utils.test_tracking import log_event, log_metrics, steps_of, write_old_journal


@pytest.fixture
def client(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow.MlflowClient(tracking_uri=uri)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_what_waits_is_sent_once_and_the_run_is_closed(client, run_dir):
    config = small_config(run_dir)
    Progress(config=fingerprint(config), key="0123").write(run_dir)  # it never reached the server
    log_metrics(run_dir, 8)
    log_event(run_dir, **{"checkpoints/step-1.json": {"step": 1}})
    outcome.deliver(config, TrainState(step=1))
    progress = Progress.read(run_dir)
    run = client.get_run(progress.run_id)
    assert run.info.status == progress.status == "FINISHED"
    assert run.data.params["train.steps"] == "12"
    assert steps_of(client, progress.run_id) == [8]
    client.set_terminated(progress.run_id, "KILLED")
    outcome.deliver(config, TrainState(step=1))  # nothing waits: MLflow is not contacted
    assert client.get_run(progress.run_id).info.status == "KILLED"


def test_a_finished_run_whose_end_was_not_recorded_is_closed(client, run_dir):
    config = small_config(run_dir)
    log_metrics(run_dir, 8)
    tracker = outcome.start_tracking(config, TrainState(), wanted=True)
    tracker.finish("KILLED", timeout=60)  # as a kill leaves it: everything but the status is sent
    outcome.deliver(config, TrainState(step=1))
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("sent", [0, 4])
def test_a_run_that_an_earlier_version_finished_is_sent_only_if_something_waits(
    client, run_dir, sent
):
    write_old_journal(run_dir, sent)
    outcome.deliver(small_config(run_dir), TrainState(step=1))
    assert bool(Progress.read(run_dir).run_id) == (sent == 0)


def test_an_untracked_run_is_not_sent(client, run_dir):
    log_metrics(run_dir, 8)
    outcome.deliver(small_config(run_dir), TrainState(step=1))
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_starting_over_closes_the_former_mlflow_run(client, run_dir):
    config = small_config(run_dir)
    former = outcome.start_tracking(config, TrainState(), wanted=True)
    former.finish("KILLED", timeout=60)
    client.update_run(former.run_id, status="RUNNING")  # as a kill leaves it
    outcome.forget_former(run_dir, track=True)
    new = outcome.start_tracking(config, TrainState(), wanted=True)
    new.finish("FINISHED", timeout=60)
    assert new.run_id != former.run_id
    assert client.get_run(former.run_id).info.status == "KILLED"
