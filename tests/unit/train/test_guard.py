import json
import math
import random

import pytest

from mdm.config import GuardConfig
from mdm.train.guard import Guard

CONFIG = GuardConfig(window=20, skips=2, rollbacks=2)


def trained_guard(steps: int = 60, seed: int = 0) -> Guard:
    """A guard that has seen losses that fall, with noise, and norms that jump."""
    guard, draw = Guard(CONFIG), random.Random(seed)
    for step in range(steps):
        loss = 3 * math.exp(-step / 100) * draw.uniform(0.9, 1.1)
        norm = draw.lognormvariate(0, 0.4)
        assert guard.judge("loss", "text", loss) == ""
        guard.accept(step, "text", loss, norm)
    return guard


@pytest.mark.parametrize("seed", range(5))
def test_only_unusual_losses_and_norms_are_spikes(seed):
    guard = trained_guard(seed=seed)
    assert "is a spike: mean" in guard.judge("loss", "text", 30.0)
    assert "is a spike" in guard.judge("norm", "text", 50.0)
    assert guard.judge("norm", "text", 1.5) == ""
    assert guard.judge("loss", "image_text", 30.0) == ""  # another task, of which nothing is known


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_always_bad(value):
    assert "is not finite" in Guard(GuardConfig(sigma=0)).judge("loss", "text", value)


def test_without_sigma_there_are_no_spikes():
    guard = Guard(GuardConfig(sigma=0, window=2))
    for step in range(9):
        guard.accept(step, "text", 1.0, 1.0)
    assert guard.judge("loss", "text", 1e9) == ""


def test_a_resumed_guard_decides_bit_for_bit_alike():
    guard = trained_guard(37)
    resumed = Guard(CONFIG, json.loads(json.dumps(guard.state())))
    draw = random.Random(7)
    for step in range(37, 90):
        loss, norm = draw.lognormvariate(0, 0.2), draw.lognormvariate(0, 1)
        for g in (guard, resumed):
            if g.judge("loss", "text", loss) or g.judge("norm", "text", norm):
                g.skip(step, known=False)
            else:
                g.accept(step, "text", loss, norm)
    assert guard.state() == resumed.state()
    assert guard.limit("norm", "text").hex() == resumed.limit("norm", "text").hex()


def test_rollback_after_too_many_skips_within_a_window():
    guard = trained_guard()
    saved = guard.state()
    for step in (60, 65):
        guard.skip(step, known=False)
        assert not guard.must_roll_back
    guard.skip(66, known=True)  # a sample is to blame: says nothing about the weights
    assert not guard.must_roll_back
    guard.accept(81, "text", 1.5, 1.0)  # by now step 60 is forgotten
    guard.skip(82, known=False)
    assert not guard.must_roll_back
    guard.skip(83, known=False)
    guard.skip(84, known=False)
    assert guard.must_roll_back
    assert guard.rollback_limit == 65 if 65 in guard.history.recent else 82
    assert not guard.gives_up(85)
    guard.roll_back(saved, decided=85, restored=50)
    assert guard.history.recent == []
    assert guard.history.skipped == 6
    assert guard.history.running == Guard(CONFIG, saved).history.running
    for step in (85, 86, 87):  # the same trouble again: that checkpoint was no cure
        guard.skip(step, known=False)
    assert guard.rollback_limit == 49
    guard.roll_back(saved, decided=88, restored=40)
    assert guard.gives_up(90)
    assert not guard.gives_up(200)
