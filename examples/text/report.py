"""The report of `make learn-text`: `report.json` for programs, `report.html` for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mdm.diffusion import schedule
from mdm.report.charts import bar_chart, line_chart
from mdm.report.page import Target, loss_charts, reached, target_chart, write_report
from mdm.report.render import render
from mdm.utils.files import read_lines

TITLES = {
    "unigram": "unigram of the pieces",
    "diffusion": "MDM, bound",
    "masked": "masked diffusion, bound",
    "autoregressive": "autoregressive Transformer",
}
TARGETS = [
    Target("ratio_to_unigram", "MDM over unigram", at_most=0.8),
    Target("ratio_to_masked", "MDM over masked diffusion", at_most=1.1, share=False),
    Target("ratio_to_autoregressive", "MDM over autoregressive", at_most=1.1, share=False),
]


def write(run: Path, markers: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write both reports into `run`, from the markers of its job stages.

    Returns the content of `report.json`.
    """
    measured, corpus = markers["measure"]["report"], markers["data"]["report"]
    report = _numbers(measured) | {
        "parameters": measured["parameters"],
        "tokens_seen": markers["train"]["report"]["samples_seen"] * corpus["row"],
        "characters_per_token": corpus["held_out"]["characters_per_token"],
        "held_out_rows": measured["rows"],
        "seconds": {name: marker["seconds"] for name, marker in markers.items()},
        "wall_seconds": sum(marker["seconds"] for marker in markers.values()),
        "corpus": corpus,
        "samples": measured["samples"],
        "settings": dict(settings),
    }
    rows = [target.row(report) for target in TARGETS]
    report["targets"] = reached(rows)
    bits = {TITLES[name]: report[_key(name)] for name in TITLES}
    content = {
        "report": report,
        "bits": [(TITLES[name], report[_key(name)], report[f"{_key(name)}_se"]) for name in TITLES],
        "levels_chart": _levels_chart(report["bound_by_level"]),
        "chart": bar_chart(bits, "bits per character of held-out text", "bits", "{:.3f}"),
        "targets": rows,
        "target_chart": target_chart(rows),
        "titles": TITLES,
        "losses": loss_charts(run / "train" / "metrics.jsonl") + _baseline_charts(run),
    }
    write_report(run, render(Path(__file__).with_name("report.html.j2"), content), report)
    return report


def table(report: Mapping[str, Any]) -> str:
    """The bits per character of every model, a line each."""
    return "\n".join(
        f"{title:30}{report[_key(name)]:8.4f} +- {report[f'{_key(name)}_se']:.4f} bits a character"
        for name, title in TITLES.items()
    )


def _key(model: str) -> str:
    """The name of a model's bits per character in `report.json`."""
    return "bits_per_character" if model == "diffusion" else model


def _numbers(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per character, their errors, parts and ratios."""
    numbers: dict[str, Any] = {}
    for name in TITLES:
        numbers[_key(name)], numbers[f"{_key(name)}_se"] = measured[name], measured[f"{name}_se"]
    for name in ("unigram", "masked", "autoregressive"):
        numbers[f"ratio_to_{name}"] = measured["diffusion"] / measured[name]
    bound = measured["bound"]
    return numbers | {
        "bound_prior": bound["prior"],
        "bound_diffusion": sum(bound["levels"]),
        "bound_reconstruction": bound["reconstruction"],
        "bound_by_level": bound["levels"],  # equal ranges of log-SNR, from noise to data
    }


def _levels_chart(levels: Sequence[float]) -> Markup:
    """Where between noise and data the bits are paid."""
    high, low = schedule.TEXT.log_snr_range()
    edges = np.linspace(low, high, len(levels) + 1)
    bars = {
        f"log-SNR {a:.1f} … {b:.1f}": value
        for a, b, value in zip(edges, edges[1:], levels, strict=False)
    }
    return bar_chart(bars, "bits per character by noise level", "bits", "{:.3f}")


def _baseline_charts(run: Path) -> list[dict[str, Any]]:
    charts = []
    for kind in ("masked", "autoregressive"):
        lines = read_lines(run / kind / "metrics.jsonl", {"samples_seen": float, "loss": float})
        if len(lines) > 1:
            x, y = ([line[name] for line in lines] for name in ("samples_seen", "loss"))
            title = f"{TITLES[kind]}: training"
            charts.append({"title": title, "svg": line_chart(x, y, title, "nats per token")})
    return charts
