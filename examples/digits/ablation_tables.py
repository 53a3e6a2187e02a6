"""Tables and charts of the ablations: variants, solvers and selection.

`runs` are {variant: [metrics of each seed]}; `solvers` {solver: {evaluations: metrics}};
`selections` {threshold in nats: metrics with `seconds`}.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdm.report.charts import row_chart, solver_chart
from mdm.report.page import tiles

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
COLUMNS = {
    "guidance": "own guidance",
    "t2i_accuracy": "caption → image",
    "t2i_accuracy_unguided": "not guided",
    "i2t_accuracy": "image → caption",
    "joint_agreement": "both at once",
    "recall": "recall",
    "fid64": "FID, 64-d",
    "loss": "loss at the end",
}
CHARTS = {  # the unit, and the metric of real images
    "t2i_accuracy": ("share of images", "classifier_accuracy"),
    "i2t_accuracy": ("share of captions", ""),
    "joint_agreement": ("share of pairs", ""),
    "recall": ("share of real images", "recall_floor"),
    "fid64": ("squared distance of features", "fid64_floor"),
    "loss": ("Eq. 18", ""),
}
SOLVER_CHARTS = ("t2i_accuracy", "fid64")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, "|---|" + "---:|" * (len(head) - 1), *others])


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def runs_table(runs: Runs) -> str:
    """Mean and deviation over the seeds, as Markdown."""
    rows = [
        [variant, *(_mean([metrics[column] for metrics in seeds]) for column in COLUMNS)]
        for variant, seeds in runs.items()
    ]
    return markdown(["variant", *COLUMNS.values()], rows)


def solver_table(solvers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Agreement and distance of every solver, as Markdown."""
    counts = list(next(iter(solvers.values())))
    cell = "{t2i_accuracy:.2f} / {fid64:.2f}".format_map
    rows = [[name, *(cell(by_count[n]) for n in counts)] for name, by_count in solvers.items()]
    return markdown(["caption → image / FID, evaluations", *counts], rows)


def selection_table(selections: Mapping[str, Mapping[str, Any]]) -> str:
    """Agreement, distance and time by threshold, as Markdown."""
    off = next(iter(selections.values()))
    rows = [
        [
            f"{threshold} nats" if float(threshold) else "off",
            *(f"{metrics[name]:.2f}" for name in ("t2i_accuracy", "fid64")),
            f"{metrics['seconds'] / off['seconds']:.2f} x",
        ]
        for threshold, metrics in selections.items()
    ]
    return markdown(["selection below", "caption → image", "FID, 64-d", "time"], rows)


def section(ablation: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the page shows of `ablation`, whose first seeds' images are in `folder`."""
    runs: Runs = ablation["variants"]
    shipped = next(iter(runs.values()))[0]
    charts, solver_charts = [], []
    for metric, (unit, floor) in CHARTS.items():
        title = COLUMNS[metric]
        real = {"real images": shipped[floor]} if floor in shipped else {}
        rows = {variant: [seed[metric] for seed in seeds] for variant, seeds in runs.items()}
        marks = {name: dict.fromkeys(rows, value) for name, value in real.items()}
        charts.append({"title": title, "svg": row_chart(rows, title, unit, marks)})
        if metric in SOLVER_CHARTS and "solvers" in ablation:
            lines = {
                solver: {int(n): metrics[metric] for n, metrics in by_count.items()}
                for solver, by_count in ablation["solvers"].items()
            }
            title = f"{title}, by evaluations"
            svg = solver_chart(lines, title, unit, real)
            solver_charts.append({"title": title, "svg": svg})
    return {
        "flags": ablation["flags"],
        "charts": charts,
        "images": tiles({variant: ablation["sheets"][variant] for variant in runs}, {}, folder),
        "solvers": solver_charts,
        "selections": ablation.get("selections", {}),
    }
