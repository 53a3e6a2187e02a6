"""Pictures drawn in the middle of a run reach MLflow and change nothing of what is trained."""

import json

import mlflow
import pytest
from PIL import Image

from tests.data_sets import write_autoencoder, write_tokenizer
from tests.distributed.test_resume import assert_equal, losses, train, weights

pytestmark = pytest.mark.distributed


def test_samples_of_snapshots_are_tracked_and_change_no_bit(tmp_path, monkeypatch):
    stage = {
        "tokenizer": str(write_tokenizer(tmp_path / "tokenizer.model")),
        "autoencoder": str(write_autoencoder(tmp_path / "autoencoder")),
        "vocab_size": 32,
    }
    options = {"real": True, "pictures": stage, "train": {"steps": 4, "checkpoint_every": 4}}
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    plain, shown = tmp_path / "plain", tmp_path / "shown"
    code, output = train(plain, **options)
    assert code == 0, output
    code, output = train(shown, draw=True, track=True, **options)
    assert code == 0, output
    assert "no pictures" not in output
    assert losses(shown) == losses(plain)
    assert_equal(weights(shown / "export"), weights(plain / "export"))

    run_id = json.loads((shown / "tracking.json").read_text())["run_id"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    names = [f"samples/step-0000000{step}" for step in (2, 4)]
    found = {a.path for a in client.list_artifacts(run_id, "samples")}
    assert found == {f"{name}.{kind}" for name in names for kind in ("png", "json")}
    path = client.download_artifacts(run_id, f"{names[1]}.png", str(tmp_path))
    with Image.open(path) as sheet:
        assert sheet.size == (2 * 16 + 2, 2 * 16 + 2)
    path = client.download_artifacts(run_id, f"{names[1]}.json", str(tmp_path))
    with open(path) as file:
        note = json.load(file)
    assert note["weights"] == str(shown / "snapshots" / "step-00000004")
    assert note["classes"] == [0, 1]
    assert len(note["captions"]) == 2
