"""The metrics and the report of a perfect model, and of one that ignores its condition."""

import json
from pathlib import Path

import pytest

from examples.digits import report as learn_report
from examples.digits.evaluation import Ruler, Sampling, evaluate
from mdm.evaluate.classifier import Classifier
from tests.unit.conftest import NAMES, WORDS, Digits, Oracle

SAMPLING = Sampling(guidance=1.0, steps=4, joint_steps=8, solver="ddpm")


@pytest.fixture(scope="module")
def ruler(digits: Digits, judge: Classifier) -> Ruler:
    n = 400
    return Ruler(
        judge,
        NAMES,
        digits.heldout.pixels[:n],
        digits.train.pixels[:n],
        digits.encoded("heldout").latents[:n],
        digits.heldout.labels[:n],
        lambda classes: [f"digit {WORDS[c]}" for c in classes],
    )


def test_real_images_reach_the_targets(ruler: Ruler, digits: Digits, tmp_path: Path) -> None:
    metrics, images, labels = evaluate(Oracle(digits), ruler, SAMPLING)
    assert metrics["t2i_accuracy"] > 0.9
    assert metrics["i2t_accuracy"] == 1.0
    assert metrics["joint_agreement"] > 0.9
    assert metrics["recall"] > 0.75 * metrics["recall_floor"]
    assert 0.5 * metrics["fid64_floor"] < metrics["fid64"] < 2 * metrics["fid64_floor"]
    assert metrics["shuffled_control"] < 0.2
    (tmp_path / "train").mkdir()
    lines = [{"samples_seen": s, "loss": 1 / s, "image_text/eps_img": 0.5 / s} for s in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "train" / "metrics.jsonl").write_text(text)
    run = {"samples_seen": 3, "wall_seconds": 1.0, "samples_per_second": 3.0}
    report = learn_report.write(tmp_path, metrics | run, images, labels, vars(SAMPLING))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    # Not recall: these images are drawn with replacement, and the repeated ones cover nothing new.
    wanted = {"class_share_min", "class_share_max", "fid64", "joint_agreement"}
    assert wanted <= {name for name, ok in report["targets"].items() if ok}
    page = (tmp_path / "report.html").read_text()
    for title in ("Does it learn?", "Targets", "Captions of held-out images", "Loss"):
        assert title in page
    assert "Loss, all tasks" in page
    assert page.count("data:image/png;base64,") >= 300
    assert str(tmp_path) not in page


def test_images_are_those_of_the_weight_that_is_nearest(ruler: Ruler, digits: Digits) -> None:
    """Here 0.5: what is drawn with other weights are images of the next class."""

    class Drawn(Oracle):
        def text_to_image(self, texts, *, guidance, **options):
            shift = 0 if guidance == 0.5 else 1
            classes = [(NAMES.named(text) + shift) % 10 for text in texts]
            pixels = self.class_to_image(classes, guidance=guidance, **options)
            return pixels if guidance == 0.5 else 0.8 * pixels

    metrics, _, labels = evaluate(Drawn(digits), ruler, SAMPLING, guidances=(1.0, 0.5, 2.0))
    assert metrics["guidance"] == 0.5
    assert metrics["t2i_accuracy"] > 0.9
    assert metrics["t2i_accuracy_unguided"] < 0.1
    assert metrics["fid64_unguided"] > metrics["fid64"]
    assert all(label.right for label in labels["drawn"][:5])
    assert evaluate(Drawn(digits), ruler, SAMPLING)[0]["guidance"] == SAMPLING.guidance


def test_a_model_that_ignores_its_condition_is_at_chance(ruler: Ruler, digits: Digits) -> None:
    metrics, _, _ = evaluate(Oracle(digits, ignores_requests=True), ruler, SAMPLING)
    assert metrics["t2i_accuracy"] < 0.2
    assert metrics["i2t_accuracy"] < 0.2
    assert metrics["fid64"] < 2 * metrics["fid64_floor"], "its images are as real as any"


def test_all_captions_of_an_image_count_and_pairs_have_their_own_steps(ruler, digits) -> None:
    steps = {}

    class OneDrawWrong(Oracle):
        def image_to_text(self, latents, **options):
            steps["captions"] = options.get("steps", "as trained")
            texts = super().image_to_text(latents, **options)
            texts[len(ruler.labels) : 2 * len(ruler.labels)] = [""] * len(ruler.labels)
            return texts

        def joint(self, n, **options):
            steps["pairs"] = options["steps"]
            return super().joint(n, **options)

    metrics, images, labels = evaluate(OneDrawWrong(digits), ruler, SAMPLING)
    assert metrics["i2t_accuracy"] == pytest.approx(2 / 3)
    assert steps == {"captions": "as trained", "pairs": SAMPLING.joint_steps}
    assert len(labels["described"]) == len(images["described"])
