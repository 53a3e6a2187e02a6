"""The search for the best learning rate, and the law that is fitted to it."""

import math
from pathlib import Path

import pytest

from examples.digits.width import Flags, best_rate, chart, power_law, summary, table
from examples.digits.width_search import Setting, finished, shared, wanted
from mdm.utils.files import write_json


def parabola(rate: float, best: float) -> float:
    return 1.0 + 0.1 * math.log(rate / best) ** 2


@pytest.mark.parametrize("best", [3e-4, 2e-3, 2.7e-3, 3e-2])
def test_the_search_ends_between_two_worse_rates_and_finds_the_minimum(best: float) -> None:
    losses: dict[float, float] = {}
    while rates := wanted(losses, 2e-3):
        losses[rates[0]] = parabola(rates[0], best)
    assert 3 <= len(losses) <= 8
    lowest = min(losses, key=lambda rate: losses[rate])
    assert {lowest / 2, 2 * lowest} < set(losses)
    assert best_rate(losses) == pytest.approx(best, rel=1e-6)


def test_a_training_that_diverged_is_worse_than_all_others() -> None:
    losses = {1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}
    assert wanted(losses, 1e-3) == []
    assert best_rate(losses) == 2e-3
    assert wanted({2e-3: math.inf}, 2e-3) == [1e-3, 4e-3]


def test_the_fitted_exponent_is_the_one_of_the_data() -> None:
    widths = (64, 64, 128, 256, 512)
    law = power_law([(width, 0.3 * width**-0.75) for width in widths])
    assert law.alpha == pytest.approx(0.75)
    assert law.error == pytest.approx(0.0, abs=1e-6)
    assert law.rate(2048) == pytest.approx(0.3 * 2048**-0.75)
    noisy = power_law([(64, 2e-2), (64, 1e-2), (512, 2e-3)])
    assert noisy.alpha == pytest.approx(math.log(math.sqrt(50)) / math.log(8))
    assert noisy.error > 0.1
    assert "alpha = 0.75 ± 0.00; at width 2048 0.00099, 9.9 times" in summary(law, 1e-4, 2048)


def test_small_widths_have_several_seeds_and_long_searches_begin() -> None:
    flags = Flags(widths="64,256,128", seeds=2)
    assert flags.runs == [(256, 0), (128, 0), (128, 1), (64, 0), (64, 1)]


def test_finished_trainings_of_the_same_setting_are_kept(tmp_path: Path) -> None:
    setting = Setting(steps=3)
    for rate, loss, steps in ((1e-3, 1.5, 3), (2e-3, None, 3), (4e-3, 1.0, 4)):
        kept = {"rate": rate, "loss": loss, "setting": shared(Setting(steps=steps))}
        write_json(tmp_path / f"{rate:.6g}.json", kept)
    (tmp_path / "0.008.json").write_text('{"rate": 0.0')
    assert finished(tmp_path, setting) == {1e-3: 1.5, 2e-3: math.inf}


def test_the_table_and_the_chart_show_every_search() -> None:
    losses = {rate: parabola(rate, 2e-3) for rate in (1e-3, 2e-3, 4e-3)}
    searches = {(128, 0): losses, (64, 1): losses | {8e-3: math.inf}, (64, 0): losses}
    text = table(searches)
    assert "| 64 | 1 | 1.048 | 1.000 | 1.048 | inf | 2.00e-03 |" in text
    assert "| 128 | 0 | 1.048 | 1.000 | 1.048 |  | 2.00e-03 |" in text
    svg = chart(searches)
    assert "held-out loss, seed 1" in svg
    assert svg.count("width 128") == 1
