"""What every report page shares: images inside the file, charts of the losses, the template.

A page is one file: images, charts and styles are in it, and it asks nothing of any network.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mdm.report.charts import line_chart
from mdm.report.image_grid import Sheet, cut_sheet
from mdm.utils.files import write_bytes

TERMS = {
    "total": "total",
    "eps_img": "noise prediction, image",
    "se_img": "score entropy, image",
    "se_txt": "score entropy, text",
    "rec_img": "reconstruction, image",
    "rec_txt": "reconstruction, text",
    "kl": "KL",
}
TASKS = {"image_text": "Images with text", "text": "Text alone"}
CONDITIONINGS = {
    "class_to_image": ("class → image", ("eps_img",)),
    "text_to_image": ("text → image", ("eps_img",)),
    "image": ("image of nothing", ("eps_img",)),
    "image_to_text": ("image → text", ("se_txt",)),
    "answer": ("image and question → answer", ("se_txt",)),
    "both": ("both at once", ("eps_img", "se_txt")),
}


@dataclass(frozen=True)
class Target:
    """A number that a run should reach, and the number to read it beside."""

    metric: str
    title: str
    at_least: float | None = None
    at_most: float | None = None
    beside: str = ""  # metric of the floor, ceiling or control
    note: str = ""

    def row(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """As the table shows it; `ok` is None where there is no target."""
        value = metrics.get(self.metric)
        ok = None
        if value is not None and self.at_least is not None:
            ok = value >= self.at_least
        elif value is not None and self.at_most is not None:
            ok = value <= self.at_most
        wanted = (
            f"≥ {self.at_least:.2f}"
            if self.at_least is not None
            else f"≤ {self.at_most:.2f}"
            if self.at_most is not None
            else ""
        )
        return {
            "metric": self.metric,
            "title": self.title,
            "value": value,
            "beside": metrics.get(self.beside),
            "target": wanted,
            "ok": ok,
            "note": self.note,
        }


def data_uri(image: Image.Image) -> str:
    """A PNG of `image` as a data: address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tiles(
    sheets: Mapping[str, Any], labels: Mapping[str, Any], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """The tiles of every sheet in `folder` with their labels, as the macros take them."""
    found = {}
    for name, plain in sheets.items():
        images = cut_sheet(Sheet(**plain), folder)
        texts = labels.get(name) or [{}] * len(images)
        found[name] = [
            {"src": data_uri(image), "text": "", "truth": "", "right": None} | text
            for image, text in zip(images, texts, strict=True)
        ]
    return found


def loss_charts(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart of the loss, of every term of every task, and of the chief ones by conditioning."""
    wanted = {"loss": "Loss, all tasks (Eq. 18)"} | {
        f"{task}/{term}": f"{task_title}: {term_title}"
        for task, task_title in TASKS.items()
        for term, term_title in TERMS.items()
    }
    wanted |= {
        f"{name}/{term}": f"{title}: {TERMS[term]}"
        for name, (title, terms) in CONDITIONINGS.items()
        for term in terms
    }
    charts = []
    for name, title in wanted.items():
        rows = [(r["samples_seen"], r[name]) for r in lines if name in r]
        if len(rows) > 1:
            x, y = zip(*rows, strict=True)
            tail = y[-max(1, len(y) // 20) :]
            svg = Markup(line_chart(x, y, title))
            charts.append({"title": title, "svg": svg, "last": sum(tail) / len(tail)})
    return charts


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def render(template: Path, content: Mapping[str, Any]) -> str:
    """The page of `template`, which may extend those of this folder; texts are escaped."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": _number, "duration": _duration}
    return env.get_template(template.name).render(**content)


def write_report(run: Path, page: str, plain: Mapping[str, Any]) -> None:
    """Write `report.html` and `report.json` into `run`, each whole or not at all."""
    for name, text in (
        ("report.html", page),
        ("report.json", json.dumps(plain, indent=2) + "\n"),
    ):
        write_bytes(run / name, text.encode())
