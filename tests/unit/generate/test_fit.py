"""Weights are used with the tokenizer and the autoencoder of their training data, or not at all."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.digits import data as learn_data
from mdm.checkpoint.exported import Training, read_provenance, write_export
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


class Made:
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
        write_export(folder, self.config, Training(), weights, model, provenance)
        return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def export(made) -> Path:
    return made.export("export", made.provenance)


def test_an_export_says_what_its_data_was_encoded_with(made, export):
    assert read_provenance(export) == made.provenance
    assert made.provenance.autoencoder in (export / "README.md").read_text()
    again = made.export("again", made.provenance) / "model.safetensors"
    assert again.read_bytes() == (export / "model.safetensors").read_bytes()
    stored = load_file(again)
    assert stored.keys() == made.weights.keys()
    assert all(torch.equal(stored[name], made.weights[name]) for name in stored)


def test_the_same_content_in_other_places_is_taken(made, export, tmp_path, caplog):
    for name in ("tokenizer", "autoencoder"):
        (tmp_path / name).symlink_to(getattr(made, name))
    places = {name: str(tmp_path / name) for name in ("tokenizer", "autoencoder")}
    model = Generator.from_pretrained(export, **places)
    model.save_pretrained(tmp_path / "saved")
    assert read_provenance(tmp_path / "saved") == made.provenance
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["tokenizer", "autoencoder"])
def test_another_one_is_refused_by_name(made, export, kind, capsys):
    other = {"tokenizer": made.other, "autoencoder": made.another}[kind]
    wanted = getattr(made.provenance, kind)
    found = Tokenizer(other).sha256 if kind == "tokenizer" else describe(other).sha256
    with pytest.raises(ValueError, match=f"has sha256 {found}, but .* {wanted}; .*--{kind}"):
        Generator.from_pretrained(export, **{kind: str(other)})
    with pytest.raises(ValueError, match=rf"{wanted}, give that \w+ as --{kind}"):
        Generator.from_pretrained(export, **{kind: str(made.folder / "gone")})


def test_a_file_that_was_replaced_under_its_path_is_refused(made, tmp_path):
    """The export's own tokenizer, and the autoencoder that its configuration names."""
    folder = made.export("replaced", made.provenance, tokenizer=made.other)
    with pytest.raises(ValueError, match=made.provenance.tokenizer):
        Generator.from_pretrained(folder)
    shutil.copy(made.tokenizer, folder / "tokenizer.model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"autoencoder": str(made.another)}))
    with pytest.raises(ValueError, match=made.provenance.autoencoder):
        Generator.from_pretrained(folder)
    Generator.from_pretrained(folder, autoencoder=str(made.autoencoder))


def test_an_export_that_records_nothing_says_so_and_goes_on(made, caplog):
    Generator.from_pretrained(made.export("old", Provenance()))
    (said,) = caplog.messages
    assert "old does not record its tokenizer and autoencoder" in said
    assert str(made.autoencoder) in said


def test_text_alone_needs_no_autoencoder(made, tmp_path):
    folder = made.export("text", dataclasses.replace(made.provenance, autoencoder=""))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"autoencoder": "gone"}))
    model = Generator.from_pretrained(folder)
    assert len(model.reply([("one",)], steps=2)) == 1
    with pytest.raises(ValueError, match="trained on text alone"):
        model.class_to_image([0], steps=2)
    with pytest.raises(ValueError, match="trained on text alone"):
        drawing.encode(model, [str(tmp_path / "a.png")])


def test_pixel_patches_are_decoded_by_no_autoencoder(made):
    folder = made.export("pixels", dataclasses.replace(made.provenance, autoencoder=PIXELS))
    with pytest.raises(ValueError, match="trained on pixel patches"):
        Generator.from_pretrained(folder)


def test_the_jobs_end_with_one_line(made, export, tmp_path, monkeypatch, capsys):
    common = ["--checkpoint", str(export), "--out", str(tmp_path / "out")]
    for job, more in (
        (generate, ["--tokenizer", str(made.other)]),
        (generate, ["--autoencoder", str(made.another)]),
        (evaluate, ["--tokenizer", str(made.other), "--autoencoder", str(made.autoencoder)]),
        (evaluate, ["--tokenizer", str(made.tokenizer), "--autoencoder", str(made.another)]),
    ):
        monkeypatch.setattr("sys.argv", ["job", *common, *more])
        with pytest.raises(SystemExit) as ended:
            job.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "has sha256" in said


def test_an_evaluation_compares_with_data_of_the_same_first_stages(made, tmp_path):
    learn_data.write(tmp_path)
    uri, tokenizer = str(tmp_path / "encoded/digits"), Tokenizer(tmp_path / "tokenizer.model")
    found, manifest = load_encoded(uri, tokenizer, PIXELS)
    assert len(found) == manifest.rows
    first_stage = made.provenance.autoencoder
    with pytest.raises(ValueError, match=f"autoencoder {PIXELS}; .* {first_stage}; .*--autoenc"):
        load_encoded(uri, tokenizer, first_stage)
    with pytest.raises(ValueError, match=f"tokenizer {tokenizer.sha256}; .*--tokenizer"):
        load_encoded(uri, Tokenizer(made.other), PIXELS)
