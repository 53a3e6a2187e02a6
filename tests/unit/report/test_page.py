"""What all report pages share."""

import json
from pathlib import Path

from mdm.report.page import Target, loss_charts, reached, target_chart, target_lines

TARGETS = (
    Target("a", "Share", at_least=0.5, beside="floor"),
    Target("b", "Control", at_most=0.2),
    Target("c", "Without a target"),
    Target("d", "Not measured", at_least=0.5),
    Target("e", "Distance", at_most=3.0, share=False),
)
METRICS = {"a": 0.4, "b": 0.1, "c": 0.3, "e": 2.0, "floor": 0.05}


def test_targets_compare_the_right_way():
    rows = [target.row(METRICS) for target in TARGETS]
    assert reached(rows) == {"a": False, "b": True, "e": True}
    assert [row["target"] for row in rows] == ["≥ 0.50", "≤ 0.20", "", "≥ 0.50", "≤ 3.00"]
    assert rows[0]["beside"] == 0.05
    lines = target_lines(METRICS | {"targets": reached(rows)})
    assert lines.splitlines() == ["MISSED  a = 0.400", "reached b = 0.100", "reached e = 2.000"]


def test_the_target_chart_shows_the_measured_shares():
    svg = target_chart([target.row(METRICS) for target in TARGETS])
    for name in ("Share", "Control", "Without a target", "target", "compared with"):
        assert f">{name}<" in svg
    assert "Not measured" not in svg
    assert "Distance" not in svg


def test_losses_with_two_values_have_a_chart(tmp_path: Path):
    lines = [
        {"samples_seen": n, "loss": 1 / n, "image_text/eps_img": 0.5 / n} for n in range(1, 41)
    ]
    lines[0] |= {"text/kl": 2.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = loss_charts(path)
    assert first["title"] == "Loss, all tasks"
    assert first["last"] == (1 / 39 + 1 / 40) / 2
    assert second["title"] == "Images with text: noise prediction, image"
    assert "squared error" in second["svg"]
