"""Weights are used only with the tokenizer and autoencoder of their training data."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.digits import data as learn_data
from mdm.checkpoint.export import read_provenance, write_export
from mdm.checkpoint.state import TrainState
from mdm.config import Config, DataConfig, ModelConfig
from mdm.data.provenance import Provenance
from mdm.evaluate.heldout import load_encoded
from mdm.first_stage.folder import PIXELS, describe
from mdm.first_stage.tokenizer import Tokenizer, train_model
from mdm.generate import Generator
from mdm.loss import Loss
from mdm.report import drawing
from pipelines import evaluate, generate
from tests.data_sets import write_autoencoder, write_tokenizer


class Run:
    """A run's tokenizer and autoencoder, others of the same shape, and untrained weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = write_tokenizer(folder / "own.model")
        self.other = folder / "other.model"
        lines = [f"{a} {b}" for a in ("red", "green", "blue") for b in ("fox", "dog", "cow")]
        self.other.write_bytes(train_model(lines * 9, 21))
        self.autoencoder = write_autoencoder(folder / "autoencoder")
        self.another = folder / "another"
        shutil.copytree(self.autoencoder, self.another)
        path = self.another / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_mean": [1.0] * 4}))
        self.provenance = Provenance(
            Tokenizer(self.tokenizer).sha256, describe(self.autoencoder).sha256
        )
        sizes = {"d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16, "chunk_size": 16}
        self.config = Config(
            model=ModelConfig(
                **sizes, vocab_size=32, n_classes=3, image_height=1, image_width=1, text_length=12
            ),
            data=DataConfig(caption_length=8, dialogue_length=12),
            tokenizer=str(self.tokenizer),
            autoencoder=str(self.autoencoder),
        )
        self.weights = Loss(self.config).state_dict()

    def export(self, name: str, provenance: Provenance, tokenizer: Path | None = None) -> Path:
        model = (tokenizer or self.tokenizer).read_bytes()
        weights = {"ema": self.weights}
        folder = self.folder / name
        write_export(folder, self.config, TrainState(), weights, model, provenance)
        return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def export(run) -> Path:
    return run.export("export", run.provenance)


def test_an_export_records_what_encoded_its_data(run, export):
    assert read_provenance(export) == run.provenance
    assert run.provenance.autoencoder in (export / "README.md").read_text()
    again = run.export("again", run.provenance) / "model.safetensors"
    assert again.read_bytes() == (export / "model.safetensors").read_bytes()
    stored = load_file(again)
    assert stored.keys() == run.weights.keys()
    assert all(torch.equal(stored[name], run.weights[name]) for name in stored)


def test_the_same_content_at_other_paths_is_accepted(run, export, tmp_path, caplog):
    for name in ("tokenizer", "autoencoder"):
        (tmp_path / name).symlink_to(getattr(run, name))
    places = {name: str(tmp_path / name) for name in ("tokenizer", "autoencoder")}
    model = Generator.from_pretrained(export, **places)
    model.save_pretrained(tmp_path / "saved")
    assert read_provenance(tmp_path / "saved") == run.provenance
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["tokenizer", "autoencoder"])
def test_another_tokenizer_or_autoencoder_is_refused_by_name(run, export, kind, capsys):
    other = {"tokenizer": run.other, "autoencoder": run.another}[kind]
    expected = getattr(run.provenance, kind)
    found = Tokenizer(other).sha256 if kind == "tokenizer" else describe(other).sha256
    with pytest.raises(ValueError, match=f"has sha256 {found}, but .* {expected}; .*--{kind}"):
        Generator.from_pretrained(export, **{kind: str(other)})
    with pytest.raises(ValueError, match=rf"{expected}, give that \w+ as --{kind}"):
        Generator.from_pretrained(export, **{kind: str(run.folder / "gone")})


def test_a_replaced_file_is_refused(run, tmp_path):
    """The export's own tokenizer, and the autoencoder that its configuration names."""
    folder = run.export("replaced", run.provenance, tokenizer=run.other)
    with pytest.raises(ValueError, match=run.provenance.tokenizer):
        Generator.from_pretrained(folder)
    shutil.copy(run.tokenizer, folder / "tokenizer.model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"autoencoder": str(run.another)}))
    with pytest.raises(ValueError, match=run.provenance.autoencoder):
        Generator.from_pretrained(folder)
    Generator.from_pretrained(folder, autoencoder=str(run.autoencoder))


def test_an_export_without_a_record_is_loaded_with_a_warning(run, caplog):
    Generator.from_pretrained(run.export("old", Provenance()))
    (line,) = caplog.messages
    assert "old does not record its tokenizer and autoencoder" in line
    assert str(run.autoencoder) in line


def test_text_alone_needs_no_autoencoder(run, tmp_path):
    folder = run.export("text", dataclasses.replace(run.provenance, autoencoder=""))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"autoencoder": "gone"}))
    model = Generator.from_pretrained(folder)
    assert len(model.reply([("one",)], steps=2)) == 1
    with pytest.raises(ValueError, match="trained on text alone"):
        model.class_to_image([0], steps=2)
    with pytest.raises(ValueError, match="trained on text alone"):
        drawing.encode(model, [str(tmp_path / "a.png")])


def test_pixel_patches_have_no_autoencoder(run):
    folder = run.export("pixels", dataclasses.replace(run.provenance, autoencoder=PIXELS))
    with pytest.raises(ValueError, match="trained on pixel patches"):
        Generator.from_pretrained(folder)


def test_the_jobs_end_with_one_line(run, export, tmp_path, monkeypatch, capsys):
    common = ["--checkpoint", str(export), "--out", str(tmp_path / "out")]
    for job, more in (
        (generate, ["--tokenizer", str(run.other)]),
        (generate, ["--autoencoder", str(run.another)]),
        (evaluate, ["--tokenizer", str(run.other), "--autoencoder", str(run.autoencoder)]),
        (evaluate, ["--tokenizer", str(run.tokenizer), "--autoencoder", str(run.another)]),
    ):
        monkeypatch.setattr("sys.argv", ["job", *common, *more])
        with pytest.raises(SystemExit) as ended:
            job.main()
        assert ended.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert "has sha256" in line


def test_an_evaluation_compares_with_data_of_the_same_first_stages(run, tmp_path):
    learn_data.write(tmp_path)
    uri, tokenizer = str(tmp_path / "encoded/digits"), Tokenizer(tmp_path / "tokenizer.model")
    found, manifest = load_encoded(uri, tokenizer, PIXELS)
    assert len(found) == manifest.rows
    first_stage = run.provenance.autoencoder
    with pytest.raises(ValueError, match=f"autoencoder {PIXELS}; .* {first_stage}; .*--autoenc"):
        load_encoded(uri, tokenizer, first_stage)
    with pytest.raises(ValueError, match=f"tokenizer {tokenizer.sha256}; .*--tokenizer"):
        load_encoded(uri, Tokenizer(run.other), PIXELS)
