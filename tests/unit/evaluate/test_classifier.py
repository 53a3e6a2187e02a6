import json
from pathlib import Path

import pytest
import torch

from mdm.evaluate import classifier
from mdm.evaluate.classifier import Classifier
from mdm.evaluate.heldout import Images
from mdm.evaluate.image import agreement
from mdm.evaluate.train_classifier import _thinned
from tests.unit.conftest import Digits


def test_the_classifier_generalises_to_held_out_digits(digits: Digits, judge: Classifier) -> None:
    seen, features = judge.judge(digits.heldout.pixels)
    assert agreement(seen, digits.heldout.labels.numpy()) > 0.85
    assert features.shape == (len(digits.heldout), classifier.FEATURES)


def test_training_is_deterministic_and_leaves_the_global_random_state(digits: Digits) -> None:
    pixels, labels = digits.train.pixels[:128], digits.train.labels[:128]
    state = torch.get_rng_state()
    first, second = (classifier.train(pixels, labels, 10, epochs=1, batch=64) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_none_of_the_classes_is_a_class_of_its_own(digits: Digits) -> None:
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(300, 3, 32, 32, generator=rng)
    pixels = torch.cat([digits.train.pixels[:400], noise[:200]])
    labels = torch.cat([digits.train.labels[:400], torch.full((200,), -1)])
    net = classifier.train(pixels, labels, 10, epochs=3, batch=64)
    assert (net.judge(noise[200:])[0] == 10).mean() > 0.95
    assert (net.judge(digits.heldout.pixels)[0] == 10).mean() < 0.1


def test_a_saved_classifier_loads_and_its_report_is_beside_it(
    judge: Classifier, digits: Digits, tmp_path: Path
) -> None:
    classifier.save(judge, tmp_path, {"accuracy": 0.9})
    loaded = classifier.load(tmp_path)
    assert json.loads((tmp_path / "classifier.json").read_text())["accuracy"] == 0.9
    a, b = (net.judge(digits.heldout.pixels[:9])[1] for net in (judge, loaded))
    assert (a == b).all()
    with pytest.raises(FileNotFoundError, match="train_classifier"):
        classifier.load(tmp_path / "none")


def test_other_images_are_thinned_evenly_to_equal_shares_of_the_sets():
    sets = [Images(torch.zeros(n, 3, 2, 2), torch.arange(n)) for n in (9, 2)]
    first, second = _thinned(sets, 5)
    assert first.labels.tolist() == [0, 4, 8]
    assert second.labels.tolist() == [0, 1]
