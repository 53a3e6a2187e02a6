"""The report of a demo run: `report.json` for programs, `report.html` for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mdm.report.image_grid import Sheet, cut_sheet
from mdm.report.page import Target, data_uri, loss_charts, render, tiles, write_report
from mdm.utils.files import load_json, read_lines

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
        note="the classifier on the same images",
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
        "Distance to the nearest training image",
        note="over that of held-out images: 1 is new, 0 is copied",
    ),
    Target("class_share_min", "Rarest class", beside="class_share_max", note="most frequent class"),
)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stages before the report")
    return load_json(path)


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


def _stages(run: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in order:
        marker = _read(run / "stages" / f"{name}.json")
        command = marker["command"]
        jobs = ("pipelines/", "examples/")
        start = next((i for i, word in enumerate(command) if word.startswith(jobs)), 0)
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
    lines = read_lines(run / "train" / "metrics.jsonl", {"step": float, "samples_seen": float})
    stages = _stages(run, order)
    training: dict[str, Any] = next(s["report"] for s in stages if s["name"] == "train")
    with Image.open(run / "autoencoder" / "reconstructions.png") as image:
        reconstructions = data_uri(image.convert("RGB"))
    metrics = evaluation["metrics"]
    return {
        "metrics": metrics,
        "targets": [target.row(metrics) for target in TARGETS],
        "tiles": tiles(evaluation["sheets"], evaluation["labels"], folder),
        "snapshots": [
            shot | {"tiles": [data_uri(p) for p in cut_sheet(Sheet(**shot["sheet"]), folder)]}
            for shot in evaluation["snapshots"]
        ],
        "replies": evaluation["replies"],
        "settings": evaluation["settings"],
        "samples_seen": evaluation["samples_seen"],
        "losses": loss_charts(lines),
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


def write(run: Path, order: Sequence[str]) -> dict[str, Any]:
    """Write `report.json` and `report.html` into `run`; the JSON's content."""
    content = collect(run, order)
    plain = to_json(content)
    write_report(run, render(Path(__file__).with_name("report.html.j2"), content), plain)
    return plain
