"""Images generated in the middle of a run are logged to MLflow and do not affect training."""

import json

import mlflow
import pytest
from PIL import Image

from tests.data_sets import write_autoencoder, write_tokenizer
from tests.distributed.test_resume import assert_tensors_equal, losses, run_training, weights

pytestmark = pytest.mark.distributed


def test_images_of_snapshots_are_logged_and_change_no_bit_of_the_run(tmp_path, monkeypatch):
    inputs = {
        "tokenizer": str(write_tokenizer(tmp_path / "tokenizer.model")),
        "autoencoder": str(write_autoencoder(tmp_path / "autoencoder")),
        "vocab_size": 32,
    }
    options = {"real": True, "images": inputs, "train": {"steps": 4, "checkpoint_every": 4}}
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    plain, with_images = tmp_path / "plain", tmp_path / "shown"
    code, output = run_training(plain, **options)
    assert code == 0, output
    code, output = run_training(with_images, draw=True, track=True, **options)
    assert code == 0, output
    assert "no images" not in output
    assert losses(with_images) == losses(plain)
    assert_tensors_equal(weights(with_images / "export"), weights(plain / "export"))

    run_id = json.loads((with_images / "tracking.json").read_text())["run_id"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    names = [f"samples/step-0000000{step}" for step in (2, 4)]
    artifacts = {a.path for a in client.list_artifacts(run_id, "samples")}
    assert artifacts == {f"{name}.{kind}" for name in names for kind in ("png", "json")}
    path = client.download_artifacts(run_id, f"{names[1]}.png", str(tmp_path))
    with Image.open(path) as sheet:
        assert sheet.size == (2 * 16 + 2, 2 * 16 + 2)
    path = client.download_artifacts(run_id, f"{names[1]}.json", str(tmp_path))
    with open(path) as file:
        note = json.load(file)
    assert note["weights"] == str(with_images / "snapshots" / "step-00000004")
    assert note["classes"] == [0, 1]
    assert len(note["captions"]) == 2
