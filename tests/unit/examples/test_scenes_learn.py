"""The job stages of `make learn-scenes`, and the report of a model's figures."""

import json
from pathlib import Path

import pytest
import torch

from examples.demo.run import SCENES
from examples.scenes import data, geneval, report
from examples.scenes.learn import Flags, stages
from mdm.evaluate.suite import Label
from mdm.presets import PRESETS
from mdm.report.page import save_tiles


def test_every_encoded_set_is_in_the_preset_and_as_long_as_its_texts():
    preset = PRESETS["scenes"]
    assert {source.name for source in preset.data.sources} == set(SCENES)
    by_name = {stage.name: stage for stage in stages(Flags(out="o", size="64", ranks=3))}
    for name in SCENES:
        words = " ".join(by_name[f"encode-{name}"].command)
        assert f"--text_length {preset.data.caption_length}" in words
        assert "--no_near_duplicates" in words
    train = " ".join(by_name["train"].words)
    assert "--num_accelerators 3 pipelines/pretrain.py --preset scenes" in train
    assert "--model.image_height 8 --model.image_width 8" in train
    assert "--size 64" in " ".join(by_name["data"].command)
    assert "vqav2=" not in " ".join(by_name["autoencoder"].command), "the images are coco's"


SHARES = [f"geneval_{task}" for task in geneval.TASKS] + ["caption_accuracy", "vqa_accuracy"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a finished run, with shares of .75 below ceilings of .9."""
    metrics = {"vqa_majority": 0.5, "dialogue_majority": 0.4, "joint_agreement": 0.3}
    metrics |= {"dialogue_accuracy": 0.8, "dialogue_accuracy_ceiling": 0.9}
    for name in SHARES:
        metrics |= {name: 0.75, f"{name}_floor": 0.1, f"{name}_ceiling": 0.9}
    names = [*geneval.TASKS, "captions", "answers", "dialogues", "joint", "real"]
    images = {name: torch.rand(3, 3, 32, 32) for name in names}
    labels = {name: [Label(f"<b> {name}", "a red one", False)] * 3 for name in names}
    save_tiles(images, labels, tmp_path / "evaluation", 2)
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    data.write(data.Flags(out=str(tmp_path / "data"), journeydb=3, coco=3, llava=3, heldout=3))
    (tmp_path / "train" / "export").mkdir(parents=True)
    (tmp_path / "train" / "export" / "config.json").write_text("{}")
    lines = [{"samples_seen": s, "loss": 1 / s} for s in (1, 2, 3)]
    (tmp_path / "train" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_the_report_compares_every_share_with_its_target_and_bounds(run):
    done = {"samples_seen": 64, "samples_per_second": 2.0}
    markers = {"train": {"title": "Train", "seconds": 32.0, "report": done}}
    written = report.write(run, markers)
    assert json.loads((run / "report.json").read_text()) == written
    assert written["targets"] == {
        "geneval_single": False,
        "geneval_colours": False,
        "geneval_two": True,
        "geneval_position": False,
        "geneval_attribution": True,
        "caption_accuracy": False,
        "vqa_accuracy": True,
    }
    assert written["geneval_two_ceiling"] == 0.9
    assert written["wall_seconds"] == 32.0
    page = (run / "report.html").read_text()
    assert "&lt;b&gt; captions" in page
    assert "Loss, all tasks" in page
    assert page.count("data:image/png;base64,") == 2 * 11
    assert str(run) not in page
