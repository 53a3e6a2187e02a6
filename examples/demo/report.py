"""The report of a demo run: `report.json` for programs, `report.html` for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from examples.demo import poster
from examples.scenes import report as scenes_report
from mdm.report.charts import bar_chart
from mdm.report.image_grid import Sheet, cut_sheet
from mdm.report.page import (
    Target,
    data_uri,
    load_sheets,
    loss_charts,
    reached,
    target_chart,
    tiles,
    write_report,
)
from mdm.report.render import render
from mdm.utils.files import load_json

ENOUGH = {  # of GenEval's tasks and captions, in the demo's time
    "geneval_single": 0.8,
    "geneval_colours": 0.7,
    "geneval_two": 0.3,
    "geneval_counting": None,
    "geneval_position": 0.4,
    "geneval_attribution": 0.2,
    "caption_accuracy": 0.5,
}
CEILING = ("classifier_accuracy_reconstructed", "ceiling: real digits through the autoencoder")
REAL = "real images against real images, same n"
TARGETS = (
    Target("class2image_accuracy", "Class → image, guided", 0.70, None, *CEILING),
    Target("class2image_accuracy_unguided", "Class → image, not guided", None, None, *CEILING),
    Target("t2i_accuracy", "Text → image", 0.60, None, *CEILING),
    Target("i2t_accuracy", "Image → text", 0.85, None, *CEILING),
    Target("joint_agreement", "Image and text at once", at_least=0.50, beside="shuffled_control",
           note="chance; over pairs in which either side is a digit"),
    Target("shuffled_control", "Control: conditions shuffled", at_most=0.20,
           note="the score of a model that ignores its condition"),
    Target("fid64", "Fréchet distance, 64 features", beside="fid64_floor", note=f"floor: {REAL}",
           share=False),
    Target("kid", "Kernel distance", beside="kid_floor", note=f"floor: {REAL}", share=False),
    Target("recall", "Recall", beside="recall_floor", note=f"ceiling: {REAL}"),
    Target("precision", "Precision", beside="precision_floor", note=f"ceiling: {REAL}"),
    Target("nn_distance_ratio", "Distance to the nearest training image", share=False,
           note="over that of held-out images: 1 is new, 0 is copied"),
    Target("class_share_min", "Rarest class", beside="class_share_max", note="commonest class",
           share=False),
)  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the job stages before the report")
    return load_json(path)


def _rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as (name, value) rows, without lists and hashes."""
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


def _stage(marker: Mapping[str, Any]) -> dict[str, Any]:
    """What the reports show of a finished job stage; the command from its script on."""
    command = marker["command"]
    jobs = ("pipelines/", "examples/")
    script = next((i for i, word in enumerate(command) if word.startswith(jobs)), 0)
    names = ("title", "seconds", "peak_rss_gib", "attempts", "report")
    return {name: marker[name] for name in names} | {
        "samples_per_second": marker["report"].get("samples_per_second"),
        "command": " ".join(command[script:]),
    }


def write(run: Path, order: Sequence[str]) -> dict[str, Any]:
    """Write `report.json`, `report.html` and `poster.png`, from the files and job stages of `run`.

    Returns the content of `report.json`: metrics and totals, then targets and job stages. Raises
    FileNotFoundError, which names the missing file.
    """
    folder = run / "evaluation"
    evaluation = _read(folder / "evaluation.json")
    of_scenes = load_sheets(run / "scenes")
    scenes = _read(run / "scenes" / "metrics.json")
    stages = {name: _stage(_read(run / "stages" / f"{name}.json")) for name in order}
    seconds = {stage["title"]: stage["seconds"] for stage in stages.values()}
    with Image.open(run / "autoencoder" / "reconstructions.png") as image:
        reconstructions = data_uri(image.convert("RGB"))
    metrics = evaluation["metrics"] | {k: v for k, v in scenes.items() if k != "seconds"}
    every = [*TARGETS, *scenes_report.targets(scenes, ENOUGH)]
    targets = [target.row(metrics) for target in every]
    rows = [
        (section.title, poster.section_tiles(section, place, content))
        for sections, place, content in (
            (poster.DIGITS, folder, evaluation),
            (poster.SCENES, run / "scenes", of_scenes),
            (poster.JOINT, folder, evaluation),
        )
        for section in sections
    ]
    poster.poster(rows).save(run / "poster.png", optimize=True)
    content = evaluation | {
        "targets": targets,
        "target_chart": target_chart(targets),
        "metrics": metrics,
        "tiles": tiles(evaluation["sheets"], evaluation["labels"], folder),
        "scenes": tiles(of_scenes["sheets"], of_scenes["labels"], run / "scenes"),
        "tasks": scenes_report.TASKS,
        "snapshots": [
            shot | {"tiles": [data_uri(p) for p in cut_sheet(Sheet(**shot["sheet"]), folder)]}
            for shot in evaluation["snapshots"]
        ],
        "losses": loss_charts(run / "train" / "metrics.jsonl"),
        "stages": stages,
        "stage_chart": bar_chart(seconds, "time of each job stage", "seconds"),
        "training": stages["train"]["report"],
        "wall_seconds": sum(seconds.values()),
        "peak_rss_gib": max(stage["peak_rss_gib"] for stage in stages.values()),
        "samples_per_second": stages["train"]["samples_per_second"],
        "reconstructions": reconstructions,
        "autoencoder": _rows(_read(run / "autoencoder" / "autoencoder.json")),
        "tokenizer": _rows(_read(run / "tokenizer" / "tokenizer.json")),
        "sources": _read(run / "data" / "SOURCES.json")["sets"],
        "config": _read(run / "train" / "export" / "config.json"),
    }
    totals = ("wall_seconds", "peak_rss_gib", "samples_per_second", "samples_seen")
    report = {**metrics, **{name: content[name] for name in totals}}
    report |= {"targets": reached(targets), "stages": stages}
    write_report(run, render(Path(__file__).with_name("report.html.j2"), content), report)
    return report
