"""Curves of quality against evaluations."""

import xml.etree.ElementTree as ET

import pytest

from mdm.report.solver_chart import chart, curves


def test_every_solver_is_asked_at_every_count():
    measured = curves(lambda name, n: len(name) / n, ("dpmpp2m", "eq9"), (5, 10))
    assert measured == {"dpmpp2m": {5: 1.4, 10: 0.7}, "eq9": {5: 0.6, 10: 0.3}}


def test_chart_has_a_falling_line_a_solver():
    svg = ET.fromstring(chart({"a": {5: 1.0, 10: 0.1}, "b": {5: 0.5, 10: 0.2}}, "error", log=True))
    paths = [p.attrib["d"] for p in svg.iter("{http://www.w3.org/2000/svg}path")]
    assert len(paths) == 2
    first, last = (tuple(map(float, p.split(","))) for p in paths[0].removeprefix("M").split("L"))
    assert first[0] < last[0]
    assert first[1] < last[1]  # the axis points down: a smaller error is lower
    assert {"a", "b", "5", "10"} <= {t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")}


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="1 numbers of evaluations"):
        chart({"a": {5: 1.0}}, "error")
    with pytest.raises(ValueError, match=r"error: 0\.0 \.\.\. 1\.0 do not fit"):
        chart({"a": {5: 1.0, 10: 0.0}}, "error", log=True)
