"""What the reports of runs share: targets, loss charts, embedded images."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mdm.evaluate.suite import Label
from mdm.report.charts import line_chart, row_chart
from mdm.report.image_grid import Sheet, cut_sheet, save_sheets
from mdm.utils.files import load_json, read_lines, write_bytes, write_json

SHEETS = "sheets.json"

TERMS = {  # title and unit
    "total": ("total", "Eq. 18"),
    "eps_img": ("noise prediction, image", "squared error / ᾱ"),
    "se_img": ("score entropy, image", "score entropy"),
    "se_txt": ("score entropy, text", "score entropy"),
    "rec_img": ("reconstruction, image", "squared error"),
    "rec_txt": ("reconstruction, text", "nats per token"),
    "kl": ("KL", "nats per token"),
}
TASKS = {"image_text": "Images with text", "text": "Text alone"}
CONDITIONINGS = {
    "class_to_image": ("class → image", ("eps_img",)),
    "text_to_image": ("text → image", ("eps_img",)),
    "image": ("unconditional image", ("eps_img",)),
    "image_to_text": ("image → text", ("se_txt",)),
    "answer": ("image and question → answer", ("se_txt",)),
    "both": ("image and text together", ("eps_img", "se_txt")),
}


@dataclass(frozen=True)
class Target:
    """A metric of a run, the bound it should reach, and the metric to compare it with."""

    metric: str
    title: str
    at_least: float | None = None
    at_most: float | None = None
    beside: str = ""  # metric of the floor, ceiling or control
    note: str = ""  # what `beside` is
    share: bool = True  # a share of 1, drawn in the chart

    def row(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What the table shows; `ok` is None where there is no target."""
        value = metrics.get(self.metric)
        sign, bound = ("≤", self.at_most) if self.at_least is None else ("≥", self.at_least)
        ok = None
        if value is not None and bound is not None:
            ok = value <= bound if sign == "≤" else value >= bound
        return asdict(self) | {
            "value": value,
            "beside": metrics.get(self.beside),
            "bound": bound,
            "target": "" if bound is None else f"{sign} {bound:.2f}",
            "ok": ok,
        }


def reached(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether each metric that has a target reaches it, from the rows of the targets."""
    return {row["metric"]: row["ok"] for row in rows if row["ok"] is not None}


def target_chart(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """The shares among the rows of the targets, with their bounds, floors and ceilings."""
    shares = [row for row in rows if row["share"] and row["value"] is not None]
    references = {
        name: {row["title"]: row[key] for row in shares if row[key] is not None}
        for name, key in (("target", "bound"), ("compared with", "beside"))
    }
    values = {row["title"]: [row["value"]] for row in shares}
    return row_chart(values, "shares and their targets", "share", references)


def target_lines(report: Mapping[str, Any]) -> str:
    """The outcome of every target in a `report.json`, a line each."""
    return "\n".join(
        f"{'reached' if ok else 'MISSED ':8}{metric} = {report[metric]:.3f}"
        for metric, ok in report["targets"].items()
    )


def data_uri(image: Image.Image) -> str:
    """A PNG of `image` as a data: address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tiles(
    sheets: Mapping[str, Any], labels: Mapping[str, Any], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """The tiles of every sheet in `folder` with their labels, as the macros take them."""
    by_name = {}
    for name, sheet in sheets.items():
        images = cut_sheet(Sheet(**sheet), folder)
        texts = labels.get(name) or [{}] * len(images)
        by_name[name] = [
            {"src": data_uri(image), "text": "", "truth": "", "right": None} | text
            for image, text in zip(images, texts, strict=True)
        ]
    return by_name


def save_tiles(
    images: Mapping[str, Tensor], labels: Mapping[str, Sequence[Label]], folder: Path, shown: int
) -> None:
    """Write the first `shown` images [n, 3, H, W] of each name into `folder`, with their labels."""
    sheets = save_sheets({name: i[:shown] for name, i in images.items()}, folder, columns=10)
    content = {
        "sheets": {name: vars(sheet) for name, sheet in sheets.items()},
        "labels": {name: [vars(label) for label in row[:shown]] for name, row in labels.items()},
    }
    write_json(folder / SHEETS, content)


def load_sheets(folder: Path) -> dict[str, Any]:
    """What `save_tiles` wrote beside its sheets: `sheets` and `labels`, both by name."""
    return load_json(folder / SHEETS, {"sheets": dict, "labels": dict})


def load_tiles(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The tiles that `save_tiles` wrote into `folder`."""
    content = load_sheets(folder)
    return tiles(content["sheets"], content["labels"], folder)


def loss_charts(metrics_file: Path) -> list[dict[str, Any]]:
    """A chart of the loss, of each term of each task, and of the main terms by conditioning.

    They are read from a run's `metrics.jsonl`. Terms with fewer than two values are left out.
    """
    lines = read_lines(metrics_file, {"samples_seen": float})
    keys = {f"{task}/{term}": f"{title}: " for task, title in TASKS.items() for term in TERMS}
    for conditioning, (title, terms) in CONDITIONINGS.items():
        keys |= {f"{conditioning}/{term}": f"{title}: " for term in terms}
    wanted = [("loss", "Loss, all tasks", "Eq. 18")]
    for key, prefix in keys.items():
        title, unit = TERMS[key.partition("/")[2]]
        wanted.append((key, prefix + title, unit))
    charts = []
    for name, title, unit in wanted:
        rows = [(line["samples_seen"], line[name]) for line in lines if name in line]
        if len(rows) > 1:
            x, y = zip(*rows, strict=True)
            svg = line_chart(x, y, title, unit)
            last = fmean(y[-max(1, len(y) // 20) :])
            charts.append({"title": title, "svg": svg, "last": last})
    return charts


def write_report(run: Path, page: str, report: Mapping[str, Any]) -> None:
    """Write `report.html` and `report.json` into `run`, each whole or not at all."""
    write_bytes(run / "report.html", page.encode())
    write_bytes(run / "report.json", (json.dumps(report, indent=2) + "\n").encode())
