"""The report of a demo run: `report.json` for programs, `report.html` for people.

The page is one file: pictures, charts and styles are in it, and it asks nothing of any network.
"""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mdm.evaluate.charts import line_chart
from mdm.evaluate.sheets import Sheet, cut_sheet

TERMS = {
    "total": "total",
    "eps_img": "noise prediction, image",
    "se_img": "score entropy, image",
    "se_txt": "score entropy, text",
    "rec_img": "reconstruction, image",
    "rec_txt": "reconstruction, text",
    "kl": "KL",
}
TASKS = {"image_text": "Pictures with text", "text": "Text alone"}


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


TARGETS = (
    Target(
        "class2image_accuracy",
        "Class → image, guided",
        at_least=0.70,
        beside="classifier_accuracy_reconstructed",
        note="ceiling: real held-out digits through the autoencoder",
    ),
    Target(
        "class2image_accuracy_unguided",
        "Class → image, no guidance",
        beside="classifier_accuracy_reconstructed",
        note="same ceiling",
    ),
    Target(
        "i2t_accuracy",
        "Image → text",
        at_least=0.85,
        beside="classifier_accuracy_reconstructed",
        note="the classifier on the same pictures",
    ),
    Target(
        "t2i_accuracy",
        "Text → image",
        at_least=0.60,
        beside="classifier_accuracy_reconstructed",
        note="same ceiling as class → image",
    ),
    Target(
        "joint_agreement",
        "Image and text at once",
        at_least=0.50,
        beside="shuffled_control",
        note="chance; over pairs in which either side is a digit",
    ),
    Target(
        "shuffled_control",
        "Control: conditions shuffled",
        at_most=0.20,
        note="what ignoring the condition scores",
    ),
    Target(
        "fid64",
        "Fréchet distance, 64 features",
        beside="fid64_floor",
        note="floor: real against real, same n",
    ),
    Target("kid", "Kernel distance", beside="kid_floor", note="floor: real against real, same n"),
    Target("recall", "Recall", beside="recall_floor", note="ceiling: real against real, same n"),
    Target(
        "precision",
        "Precision",
        beside="precision_floor",
        note="ceiling: real against real, same n",
    ),
    Target(
        "nn_distance_ratio",
        "Distance to the nearest training picture",
        note="over that of held-out pictures: 1 is new, 0 is copied",
    ),
    Target("class_share_min", "Rarest class", beside="class_share_max", note="most frequent class"),
)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stages before the report")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tiles(
    sheets: Mapping[str, Any], labels: Mapping[str, Any], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    tiles = {}
    for name, plain in sheets.items():
        pictures = cut_sheet(Sheet(**plain), folder)
        texts = labels.get(name) or [{}] * len(pictures)
        tiles[name] = [
            {"src": _data_uri(picture), "text": "", "truth": "", "right": None} | text
            for picture, text in zip(pictures, texts, strict=True)
        ]
    return tiles


def _rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as (name, value) rows, lists and hashes left out."""
    rows = []
    for key, value in values.items():
        name = (prefix + key).replace("_", " ")
        if isinstance(value, Mapping):
            rows += _rows(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            rows.append((name, f"{value:.4g}"))
        elif not isinstance(value, list) and "sha256" not in key:
            rows.append((name, str(value)))
    return rows


def _losses(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart of the loss and of every term of every task that occurs."""
    wanted = {"loss": "Loss, all tasks (Eq. 18)"} | {
        f"{task}/{term}": f"{task_title}: {term_title}"
        for task, task_title in TASKS.items()
        for term, term_title in TERMS.items()
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


def _stages(run: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in order:
        marker = _read(run / "stages" / f"{name}.json")
        command = marker["command"]
        start = next((i for i, word in enumerate(command) if word.startswith("pipelines/")), 0)
        rows.append(
            {
                "name": name,
                "title": marker["title"],
                "seconds": marker["seconds"],
                "peak_rss_gib": marker["peak_rss_gib"],
                "attempts": marker["attempts"],
                "samples_per_second": marker["report"].get("samples_per_second"),
                "report": marker["report"],
                "command": " ".join(command[start:]),
            }
        )
    return rows


def collect(run: Path, order: Sequence[str]) -> dict[str, Any]:
    """Everything that the report shows, from the files of `run` and the stages in `order`.

    Raises FileNotFoundError naming the first file that is missing.
    """
    evaluation = _read(run / "evaluation" / "evaluation.json")
    folder = run / "evaluation"
    with (run / "train" / "metrics.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    stages = _stages(run, order)
    training: dict[str, Any] = next(s["report"] for s in stages if s["name"] == "train")
    with Image.open(run / "autoencoder" / "reconstructions.png") as picture:
        reconstructions = _data_uri(picture.convert("RGB"))
    metrics = evaluation["metrics"]
    return {
        "metrics": metrics,
        "targets": [target.row(metrics) for target in TARGETS],
        "tiles": _tiles(evaluation["sheets"], evaluation["labels"], folder),
        "snapshots": [
            shot | {"tiles": [_data_uri(p) for p in cut_sheet(Sheet(**shot["sheet"]), folder)]}
            for shot in evaluation["snapshots"]
        ],
        "replies": evaluation["replies"],
        "settings": evaluation["settings"],
        "samples_seen": evaluation["samples_seen"],
        "losses": _losses(lines),
        "stages": stages,
        "training": training,
        "wall_seconds": sum(s["seconds"] for s in stages),
        "peak_rss_gib": max(s["peak_rss_gib"] for s in stages),
        "samples_per_second": training.get("samples_per_second"),
        "reconstructions": reconstructions,
        "autoencoder": _rows(_read(run / "autoencoder" / "autoencoder.json")),
        "tokenizer": _rows(_read(run / "tokenizer" / "tokenizer.json")),
        "counts": [
            {"set": name, "what": what, "count": count}
            for name, found in evaluation["counts"].items()
            for what, count in found.items()
        ],
        "sources": _read(run / "data" / "SOURCES.json")["sets"],
        "config": _read(run / "train" / "export" / "config.json"),
    }


def to_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `report.json` holds: the metrics and totals at the top, then targets and stages."""
    return {
        **content["metrics"],
        "wall_seconds": content["wall_seconds"],
        "peak_rss_gib": content["peak_rss_gib"],
        "samples_per_second": content["samples_per_second"],
        "samples_seen": content["samples_seen"],
        "targets": {t["metric"]: t["ok"] for t in content["targets"] if t["ok"] is not None},
        "stages": {
            s["name"]: {k: v for k, v in s.items() if k != "name"} for s in content["stages"]
        },
    }


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def render(content: Mapping[str, Any]) -> str:
    """The page for `content` of `collect`; texts are escaped."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": _number, "duration": _duration}
    return env.get_template("report.html.j2").render(**content)


def write(run: Path, order: Sequence[str]) -> dict[str, Any]:
    """Write `report.json` and `report.html` into `run`; the JSON's content."""
    content = collect(run, order)
    plain = to_json(content)
    for name, text in (
        ("report.html", render(content)),
        ("report.json", json.dumps(plain, indent=2) + "\n"),
    ):
        temporary = run / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, run / name)
    return plain
