"""Files that an earlier version saved are read, resumed, exported, replayed and sampled.

`saved.tar.xz` was written by the version of November 2026 that came before the renaming of modules
and configuration fields (commit f3f5014):

    encoded/       two data sets of its encode job; `tokenizer.model`, `autoencoder`
    run/           four steps of `pretrain.py` on two ranks: checkpoint, export, logs
    after/run/     that version's own checkpoint after it resumed `run` to step 6
    rolled_back/   sixteen steps of which two were skipped and rolled back: replay boxes, and a
                   checkpoint whose loader excludes samples
    expected.json  what that version computed from these files
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mdm.generate import Generator
from mdm.loss import Loss
from mdm.train import replay_box
from tests.helpers import ROOT

FLAGS = {
    "preset": "demo",
    "model.d_model": 16,
    "model.n_layer": 2,
    "model.d_state": 8,
    "model.headdim": 8,
    "model.chunk_size": 8,
    "model.vocab_size": 32,
    "model.n_classes": 4,
    "model.image_height": 2,
    "model.image_width": 2,
    "model.text_length": 16,
    "model.kernel": "torch",
    "data.root": "encoded",
    "data.sources": "images:0.7,dialogues:0.3",
    "data.global_batch": 8,
    "data.shuffle_window": 2,
    "data.caption_length": 8,
    "data.dialogue_length": 16,
    "train.warmup": 2,
    "train.decay": "constant",
    "train.precision": "fp32",
    "train.threads": 1,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "train.snapshots": 0,
    "train.keep": 1,
    "train.ema2": 0.9,
    "train.deepspeed": "zero3.json",
    "tokenizer": "tokenizer.model",
    "autoencoder": "autoencoder",
    "guard.replay_boxes": 2,
    # That version's preset.
    "objective.p_text_to_image": 0.34,
    "objective.p_image_to_text": 0.18,
    "objective.p_image": 0.2,
    "objective.p_text": 0.05,
    "objective.image_shift": 1.0,
    "objective.text_shift": 1.0,
    "train.lr": 2e-3,
    "train.beta2": 0.95,
    "train.ema": 0.998,
    # What that version did, and this one does otherwise by default.
    "model.adaln": False,
    "model.silent": False,
    "model.text_head": "latent",
    "model.text_summary": "tokens",
    "objective.answer_prompts": False,
    "objective.image_candidates": "latents",
    "objective.image_weight": "v_capped",
    "objective.eps_image": 1.0,
    "objective.se_image": 0.1,
}
ROLLED_BACK = {
    "train.lr": 0.2,
    "train.decay": "cosine",
    "guard.sigma": 1,
    "guard.window": 3,
    "guard.skips": 1,
    "guard.suspects": 0,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A fresh copy of the files."""
    with tarfile.open(Path(__file__).with_name("saved.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def expected(saved: Path) -> dict:
    return json.loads((saved / "expected.json").read_text())


def run_job(saved: Path, command: list[str], flags: dict[str, object], code: int = 0) -> str:
    """Run a job in the folder of the files, to exit code `code`; returns its output."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    result = subprocess.run(
        [*command, *words], cwd=saved, env=environment, capture_output=True, text=True, timeout=600
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


def pretrain(saved: Path, ranks: int, flags: dict[str, object]) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return run_job(saved, [*launcher, str(ROOT / "pipelines/pretrain.py")], FLAGS | flags)


def numbers(checkpoint: Path) -> dict[str, np.ndarray]:
    """Weights, moments and averages of every rank, as they lie in its files."""
    paths = sorted(checkpoint.glob("rank-*/*.0000"))
    return {f"{p.parent.name}/{p.name}": np.fromfile(p, np.float32) for p in paths}


def committed(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())


@pytest.mark.distributed
def test_a_saved_run_resumes_with_the_same_samples_and_losses(saved, expected):
    output = pretrain(saved, 2, {"run_dir": "run", "train.steps": 6})
    assert "step-00000004" in output
    ours, theirs = (saved / f / "checkpoints/step-00000006" for f in ("run", "after/run"))
    assert committed(ours)["loader"] == committed(theirs)["loader"]
    lines = (saved / "run/metrics.jsonl").read_text().splitlines()
    losses = {str(row["step"]): row["loss"] for row in map(json.loads, lines) if "loss" in row}
    # Of the two resumed steps, the second sees estimates of texts, which are drawn otherwise now.
    assert losses.keys() == expected["losses"].keys()
    assert losses.pop("6") == pytest.approx(expected["losses"].pop("6"), rel=0.05)
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    one, other = numbers(ours), numbers(theirs)
    assert {name: values.shape for name, values in one.items()} == {
        name: values.shape for name, values in other.items()
    }
    assert len(one) == 10


@pytest.mark.distributed
def test_samples_excluded_by_a_saved_run_stay_excluded(saved):
    before = committed(saved / "rolled_back/checkpoints/step-00000016")["loader"]
    pretrain(saved, 1, {"run_dir": "rolled_back", "train.steps": 18} | ROLLED_BACK)
    after = committed(saved / "rolled_back/checkpoints/step-00000018")["loader"]
    assert len(before["quarantined"]) == 13
    assert set(before["quarantined"]) <= set(after["quarantined"])
    assert after["step"] == 18


def test_a_saved_checkpoint_exports_the_very_weights_that_its_version_exported(saved):
    job = [sys.executable, str(ROOT / "pipelines/export.py")]
    flags = {"checkpoint": "run/checkpoints/step-00000004", "out": "again", "weights": "ema,ema2"}
    run_job(saved, job, flags)
    for name in ("model.safetensors", "model.ema2.safetensors"):
        ours, theirs = load_file(saved / "again" / name), load_file(saved / "run/export" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_a_saved_export_generates_the_same_images_and_texts(saved, expected, monkeypatch):
    monkeypatch.chdir(saved)
    shutil.copy("tokenizer.model", "run/export")
    model = Generator.from_pretrained("run/export", autoencoder="autoencoder", precision="fp32")
    images = model.text_to_image(["one", "three"], seed=3)
    torch.testing.assert_close(images, torch.tensor(expected["images"]), rtol=0, atol=1e-3)
    latents = torch.linspace(-2, 2, 128).reshape(2, 4, 16)
    assert model.image_to_text(latents, seed=3) == expected["texts"]
    images, texts = model.joint(2, seed=3)  # whose text begins with the image now
    assert images.shape == torch.tensor(expected["joint_images"]).shape
    assert len(texts) == 2


def test_a_saved_run_is_not_resumed_with_another_model(saved):
    flags = {"run_dir": "run", "train.steps": 6, "model.adaln": True}
    job = [sys.executable, str(ROOT / "pipelines/pretrain.py")]
    message = run_job(saved, job, FLAGS | flags, code=2)
    assert "model.adaln was False and is True" in message
    assert "Traceback" not in message


def test_a_saved_replay_box_gives_the_losses_of_its_version(saved, expected):
    record = expected["replayed_step"]
    loss, samples = replay_box.replay(saved / record["folder"], Loss)
    assert loss == pytest.approx(record["loss"], rel=1e-4)
    ours = {sample.id: (sample.loss, sample.norm) for sample in samples}
    assert ours.keys() == record["samples"].keys()
    for name, (sample_loss, norm) in record["samples"].items():
        assert ours[name] == pytest.approx((sample_loss, norm), rel=1e-3), name


def test_saved_data_sets_verify(saved):
    job = [sys.executable, str(ROOT / "pipelines/verify.py")]
    for name in ("images", "dialogues"):
        run_job(saved, job, {"data": f"encoded/{name}"})
