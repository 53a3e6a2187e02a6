"""What each choice is worth: tables and charts of variants, solvers and selection over seeds.

`runs` are {variant: [metrics of a seed]}; `solvers` {solver: {evaluations: metrics}}; `selections`
{threshold in nats: metrics with `seconds`}.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from mdm.report.page import tiles
from mdm.report.solver_chart import chart

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
COLUMNS = {
    "t2i_accuracy": "caption → image",
    "t2i_accuracy_unguided": "not guided",
    "i2t_accuracy": "image → caption",
    "joint_agreement": "both at once",
    "recall": "recall",
    "fid64": "FID, 64-d",
    "loss": "loss at the end",
}
CHARTED = ("t2i_accuracy", "i2t_accuracy", "joint_agreement", "recall", "fid64", "loss")
_LEFT, _WIDTH, _ROW = 128, 360, 15  # of a dot chart, in its own units


def runs_table(runs: Runs) -> str:
    """Mean and deviation over the seeds, as Markdown."""
    lines = [
        "| variant | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, found in runs.items():
        cells = []
        for column in COLUMNS:
            values = [f[column] for f in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def solver_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Agreement and distance of every solver, as Markdown."""
    counts = list(next(iter(found.values())))
    lines = [
        "| caption → image / FID, evaluations | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---:|" * len(counts),
    ]
    for name, row in found.items():
        cells = [f"{row[n]['t2i_accuracy']:.2f} / {row[n]['fid64']:.2f}" for n in counts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def selection_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Agreement, distance and time by threshold, as Markdown."""
    lines = ["| selection below | caption → image | FID, 64-d | time |", "|---|---:|---:|---:|"]
    off = next(iter(found.values()))
    for threshold, row in found.items():
        name = f"{threshold} nats" if float(threshold) else "off"
        share = row["seconds"] / off["seconds"]
        lines.append(f"| {name} | {row['t2i_accuracy']:.2f} | {row['fid64']:.2f} | {share:.2f} x |")
    return "\n".join(lines)


def dot_chart(values: Mapping[str, Sequence[float]], title: str) -> str:
    """An SVG with a row for each name: a dot for each value, a bar at their mean."""
    everything = [v for row in values.values() for v in row]
    low, high = min(0.0, *everything), max(everything)
    height = _ROW * len(values) + 18

    def px(value: float) -> float:
        return _LEFT + 6 + (value - low) / ((high - low) or 1.0) * (_WIDTH - _LEFT - 16)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for i, (name, row) in enumerate(values.items()):
        y = _ROW * (i + 0.5)
        mean = px(statistics.fmean(row))
        parts.append(
            f'<path class="grid" d="M{_LEFT},{y}H{_WIDTH}"/><text class="tick" x="{_LEFT - 6}" '
            f'y="{y + 3}" text-anchor="end">{escape(name)}</text>'
            f'<path class="line" d="M{mean:.1f},{y - 5}v10"/>'
        )
        parts += [f'<circle class="dot" cx="{px(v):.1f}" cy="{y}" r="2.4"/>' for v in row]
    for value in (low, (low + high) / 2, high):
        parts.append(
            f'<text class="tick" x="{px(value):.1f}" y="{height - 4}" text-anchor="middle">'
            f"{value:.3g}</text>"
        )
    return "".join(parts) + "</svg>"


def section(ablation: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the page shows of `ablation`, whose first seeds' images lie in `folder`."""
    runs: Runs = ablation["variants"]
    found = {
        "flags": ablation["flags"],
        "charts": [
            {
                "title": COLUMNS[c],
                "svg": Markup(dot_chart({k: [f[c] for f in v] for k, v in runs.items()}, c)),
            }
            for c in CHARTED
        ],
        "images": tiles({name: ablation["sheets"][name] for name in runs}, {}, folder),
        "solvers": [],
        "selections": ablation.get("selections", {}),
    }
    if solvers := ablation.get("solvers"):
        for metric in ("t2i_accuracy", "fid64"):
            lines = {
                name: {int(n): row[metric] for n, row in rows.items()}
                for name, rows in solvers.items()
            }
            title = f"{COLUMNS[metric]}, by evaluations"
            found["solvers"].append({"title": title, "svg": Markup(chart(lines, title))})
    return found
