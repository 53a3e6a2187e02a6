"""The suite scores generators with known results: perfect, unconditional, and copying."""

import dataclasses

import pytest
import torch

from mdm.evaluate.classifier import Classifier
from mdm.evaluate.heldout import balanced
from mdm.evaluate.suite import DemoData, Settings, run_demo, snapshot
from tests.unit.conftest import Digits, Oracle

SETTINGS = Settings(n=200)
METRICS = {
    "class2image_accuracy",
    "class2image_accuracy_unguided",
    "i2t_accuracy",
    "t2i_accuracy",
    "joint_agreement",
    "shuffled_control",
    "recall",
    "recall_floor",
    "fid64",
    "fid64_floor",
    "kid",
    "kid_floor",
    "nn_distance_ratio",
    "class_share_min",
    "class_share_max",
    "classifier_accuracy",
    "classifier_accuracy_reconstructed",
}


def test_a_perfect_generator_scores_the_floors(
    digits: Digits, judge: Classifier, demo_data: DemoData
) -> None:
    result = run_demo(Oracle(digits), judge, demo_data, SETTINGS)
    m = result.metrics
    assert set(m) >= METRICS
    assert m["class2image_accuracy"] == m["class2image_accuracy_unguided"]
    assert m["class2image_accuracy"] > m["classifier_accuracy"] - 0.05 > 0.8
    assert m["i2t_accuracy"] == 1.0
    assert m["i2t_exact"] == 1.0
    assert m["joint_agreement"] > 0.85
    assert m["joint_class_share"] == 1.0
    assert m["shuffled_control"] == pytest.approx(0.1, abs=0.03)
    assert m["recall"] == pytest.approx(m["recall_floor"], abs=0.2)
    assert m["fid64"] < 4 * m["fid64_floor"]
    assert m["nn_distance_ratio"] == pytest.approx(1.0, abs=0.2)
    assert 0.05 < m["class_share_min"] <= 0.1 <= m["class_share_max"] < 0.15
    for name, labels in result.labels.items():
        assert len(labels) == len(result.images[name])
    assert result.images["class_to_image"].shape == (100, 3, 32, 32)
    assert result.replies[1]["turns"] == ["how are you?", "fine", "good"]


def test_captions_and_replies_are_the_most_typical_of_the_candidates(
    digits: Digits, judge: Classifier, demo_data: DemoData
) -> None:
    candidates = {}

    class Recording(Oracle):
        def image_to_text(self, latents, **options):
            candidates["captions"] = options["candidates"]
            return super().image_to_text(latents, **options)

        def reply(self, turns, **options):
            candidates["replies"] = options["candidates"]
            return super().reply(turns, **options)

    run_demo(Recording(digits), judge, demo_data, Settings(n=20, candidates=3))
    assert candidates == {"captions": 3, "replies": 3}


def test_a_generator_that_ignores_its_condition_scores_chance(
    digits: Digits, judge: Classifier, demo_data: DemoData
) -> None:
    m = run_demo(Oracle(digits, ignores_requests=True), judge, demo_data, SETTINGS).metrics
    assert m["class2image_accuracy"] < 0.2
    assert m["i2t_accuracy"] == pytest.approx(0.1, abs=0.02)
    assert m["joint_agreement"] < 0.2
    assert m["fid64"] < 4 * m["fid64_floor"]


def test_copies_of_training_images_are_detected(
    digits: Digits, judge: Classifier, demo_data: DemoData
) -> None:
    m = run_demo(Oracle(digits, pool="train"), judge, demo_data, SETTINGS).metrics
    assert m["class2image_accuracy"] > 0.9
    assert m["nn_distance_ratio"] < 0.01


def test_two_runs_give_the_same_numbers(
    digits: Digits, judge: Classifier, demo_data: DemoData
) -> None:
    small = dataclasses.replace(SETTINGS, n=60)
    first, second = (run_demo(Oracle(digits), judge, demo_data, small) for i in range(2))
    assert first.plain() == second.plain()


def test_a_snapshot_has_two_rows_of_every_class_and_one_of_texts(
    digits: Digits, judge: Classifier
) -> None:
    images, rough = snapshot(Oracle(digits), judge, ["digit one"] * 3, SETTINGS)
    assert images.shape == (23, 3, 32, 32)
    assert rough > 0.8


def test_balanced_alternates_between_the_classes() -> None:
    classes = torch.tensor([0, 0, 0, 1, -1, 1, 2])
    assert balanced(classes, 5).tolist() == [0, 3, 6, 1, 5]
