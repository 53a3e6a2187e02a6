"""Metrics against known answers."""

import numpy as np
import pytest

from mdm.evaluate.image import (
    agreement,
    class_shares,
    frechet_distance,
    kernel_distance,
    nn_distance_ratio,
    precision_recall,
    shuffled_control,
)


def normal(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_frechet_of_a_set_with_itself_is_zero() -> None:
    x = normal(300, 64, 0)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_of_a_shift_is_its_square_and_of_a_scale_closed_form() -> None:
    x = normal(500, 8, 0)
    assert frechet_distance(x, x + 3.0) == pytest.approx(8 * 9.0, rel=1e-9)
    # Same mean after centring, covariance S and 4 S: tr(S + 4S - 2·2S) = tr S.
    x -= x.mean(0)
    assert frechet_distance(x, 2 * x) == pytest.approx(float(np.trace(np.cov(x.T))), rel=1e-9)


def test_frechet_of_different_gaussians_approaches_the_closed_form() -> None:
    d, rng = 3, np.random.default_rng(1)
    scale_a, scale_b = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 1.5])
    a = rng.standard_normal((200_000, d)) * scale_a
    b = rng.standard_normal((200_000, d)) * scale_b + 1.0
    exact = d * 1.0 + float(np.sum((scale_a - scale_b) ** 2))
    assert frechet_distance(a, b) == pytest.approx(exact, rel=0.02)


def test_frechet_accepts_constant_features() -> None:
    x = np.concatenate([normal(100, 4, 0), np.zeros((100, 4))], axis=1)
    assert frechet_distance(x, x + 1.0) == pytest.approx(8.0, rel=1e-6)


def test_kernel_distance_is_unbiased_and_detects_a_shift() -> None:
    same = [kernel_distance(normal(200, 16, s), normal(200, 16, s + 99), seed=s) for s in range(8)]
    assert abs(np.mean(same)) < 2 * np.std(same) / np.sqrt(len(same)) + 0.01
    assert min(same) < 0.0 < max(same)
    assert kernel_distance(normal(200, 16, 0), normal(200, 16, 1) + 1.0, seed=0) > 20 * max(same)


def test_kernel_distance_of_points_is_its_closed_form() -> None:
    # Two constant sets: k(x,x) + k(y,y) - 2 k(x,y) with k = (x·y/d + 1)³.
    a, b = np.full((10, 2), 1.0), np.full((10, 2), 2.0)
    assert kernel_distance(a, b, seed=0) == pytest.approx(2.0**3 + 5.0**3 - 2 * 3.0**3)


def test_precision_and_recall_of_a_set_with_itself_are_one() -> None:
    x = normal(200, 8, 0)
    assert precision_recall(x, x) == (1.0, 1.0)


def test_collapse_keeps_precision_and_loses_recall() -> None:
    real = normal(400, 8, 0)
    collapsed = real[:1] + 1e-3 * normal(400, 8, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0
    assert recall < 0.01


def test_scatter_loses_precision() -> None:
    precision, _ = precision_recall(normal(400, 8, 0), 50.0 * normal(400, 8, 1))
    assert precision < 0.05


def test_nearest_neighbours_distinguish_copies_from_new_images() -> None:
    train, heldout, fresh = normal(500, 8, 0), normal(100, 8, 1), normal(100, 8, 2)
    assert nn_distance_ratio(fresh, heldout, train) == pytest.approx(1.0, abs=0.15)
    assert nn_distance_ratio(train[:100], heldout, train) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="not held out"):
        nn_distance_ratio(fresh, np.zeros((9, 8)), np.zeros((9, 8)))


def test_shuffling_scores_chance() -> None:
    wanted = np.arange(500) % 10
    assert agreement(wanted, wanted) == 1.0
    assert shuffled_control(wanted, wanted, seed=0) == pytest.approx(0.1, abs=0.02)
    # A generator that draws only one class agrees by chance, shuffled or not.
    assert shuffled_control(np.zeros(500, int), wanted, seed=0) == pytest.approx(0.1)


def test_images_of_no_class_count_in_the_total_of_class_shares() -> None:
    assert class_shares(np.array([0, 0, 1, 2]), 2).tolist() == [0.5, 0.25]
