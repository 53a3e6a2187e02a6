"""Charts as matplotlib draws them: what is in the SVG, and on which axes."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from mdm.report import charts

SVG = "{http://www.w3.org/2000/svg}"
SOLVERS = {"a": {5: 1.0, 10: 0.1}, "b": {5: 0.5, 10: 0.2}}
PANELS = {name: {"x": {1: 1.0, 2: 2.0}, "y": {1: 3.0}} for name in ("first", "second", "third")}
CHARTS: dict[str, Callable[[], str]] = {
    "line": lambda: charts.line_chart([0, 1000, 2000], [3, 2, 1], "<loss>", "nats"),
    "histogram": lambda: charts.histogram({3: 10, 5: 20}, "<lengths>", "tokens", "texts"),
    "solver": lambda: charts.solver_chart(SOLVERS, "<error>", "error", {}),
    "row": lambda: charts.row_chart({"one": [0.5]}, "<share>", "share", {"goal": {"one": 0.7}}),
    "bar": lambda: charts.bar_chart({"one": 3.0}, "<time>", "seconds"),
    "panels": lambda: charts.line_panels(PANELS, "<norms>", "block", columns=2),
}


def texts(svg: str) -> set[str]:
    return {"".join(t.itertext()) for t in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def line_ends(svg: str, colour: str) -> list[tuple[float, float]]:
    """First and last point of the line of this colour."""
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if f"stroke: {colour}" in path.get("style", "") and path.get("clip-path"):
            points = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.attrib["d"])
            return [(float(x), float(y)) for x, y in (points[0], points[-1])]
    raise AssertionError(f"no line is {colour}")


@pytest.mark.parametrize("name", CHARTS)
def test_chart_is_deterministic_self_contained_and_follows_the_theme_of_its_page(name):
    svg = CHARTS[name]()
    assert svg == CHARTS[name]()
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"].startswith("<")  # escaped in the file
    assert "://" not in svg.replace("http://www.w3.org/", "")
    for colour, variable in charts.THEME.items():
        assert colour not in svg.replace(f"var({variable}, {colour})", "")
    assert "var(--soft, " in svg
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert all(re.fullmatch(r"[a-zC]*[0-9a-f]+", i) for i in ids), "names every chart would have"


def test_axes_are_labelled_with_text():
    assert {"samples seen", "nats", "0", "1k", "2k"} <= texts(CHARTS["line"]())
    assert {"tokens", "texts"} <= texts(CHARTS["histogram"]())
    assert {"evaluations of the network", "5", "10", "a", "b"} <= texts(CHARTS["solver"]())
    assert {"share", "one", "goal", "value"} <= texts(CHARTS["row"]())
    assert {"seconds", "one", "3"} <= texts(CHARTS["bar"]())
    assert {"first", "third", "block", "x", "y"} <= texts(CHARTS["panels"]())
    rates = {"loss": {"x": {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}}}
    svg = charts.line_panels(rates, "", "rate", columns=1, logarithmic=True)
    (x, _), (end, _) = line_ends(svg, charts.SERIES[0])
    middle = re.findall(r"[ML] ([\d.]+) ", svg)
    assert f"{(x + end) / 2:.3f}"[:-2] in {
        point[: len(f"{(x + end) / 2:.3f}") - 2] for point in middle
    }


def test_a_loss_over_more_than_a_factor_of_ten_has_a_logarithmic_axis():
    x = list(range(200))
    halving = [2.0 ** -(i / 20) for i in x]  # a straight line on a logarithmic axis
    assert {"0.01", "0.1", "1"} <= texts(charts.line_chart(x, halving, "loss", "nats"))
    near = charts.line_chart(x, [1 + value for value in halving], "loss", "nats")
    assert {"1.2", "1.4", "1.6", "1.8"} <= texts(near)
    charts.line_chart(x, [0.0, *halving[1:]], "loss", "nats")  # zero has no logarithm


def test_a_line_needs_two_finite_values():
    with pytest.raises(ValueError, match="loss: 1 finite values; a line needs at least 2"):
        charts.line_chart([1.0, 2.0], [2.0, float("nan")], "loss", "nats")


def test_smoothing_keeps_a_constant_and_damps_noise():
    assert charts.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert charts.smooth([1.0, 5.0]).tolist() == [1.0, 5.0]
    wave = charts.smooth([(-1.0) ** i for i in range(200)])
    assert max(map(abs, wave)) < 0.2


def test_a_smaller_error_is_lower_and_more_evaluations_are_further_right():
    svg = CHARTS["solver"]()
    for colour in charts.SERIES[:2]:
        (left, high), (right, low) = line_ends(svg, colour)
        assert left < right
        assert high < low  # the axis points down
    floor = charts.solver_chart(SOLVERS, "error", "error", {"floor": 0.01})
    assert "floor" in texts(floor)
    assert "0.01" in texts(floor), "the axis reaches down to the floor"


def test_a_row_has_a_dot_for_each_value_and_names_are_escaped():
    def marks(**rows: list[float]) -> int:
        return charts.row_chart(rows, "share", "share", {}).count("<use")

    assert marks(a=[0.1, 0.2]) - marks(a=[0.1]) == 2  # the dot and the bar at the mean
    assert marks(a=[0.1, 0.2, 0.4]) - marks(a=[0.1, 0.2]) == 1
    assert marks(a=[0.1], b=[0.2]) - marks(a=[0.1]) >= 1
    svg = charts.row_chart({"$x$ <b>": [1.0]}, "share", "share", {})
    assert "$x$ &lt;b&gt;" in svg
    assert "<b>" not in svg


def test_a_histogram_has_few_bars_whatever_the_range():
    def bars(counts: dict[int, int]) -> int:
        return charts.histogram(counts, "t", "x", "y").count("fill: var(--accent")

    assert bars({7: 1}) == 1
    assert bars(dict.fromkeys(range(10), 1)) == 10
    assert 16 <= bars(dict.fromkeys(range(1000), 1)) <= charts.BARS
