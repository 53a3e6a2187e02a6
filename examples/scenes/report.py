"""The report of `make learn-scenes`: `report.json` for programs, `report.html` for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.published import MARKER
from mdm.report.page import (
    Target,
    load_tiles,
    loss_charts,
    reached,
    render,
    target_chart,
    write_report,
)
from mdm.utils.files import load_json

CEILING = "ceiling: real scenes after the autoencoder, read by the judge"
GENEVAL = {  # title and least share, of an hour on two cores
    "single": ("One digit", 0.95),
    "colours": ("Its colour", 0.9),
    "two": ("Two digits", 0.7),
    "counting": ("Number of digits", None),
    "position": ("Where two digits stand", 0.8),
    "attribution": ("Colours of two digits", 0.6),
}
MARGIN = 0.2  # of answers above the majority's


def targets(metrics: Mapping[str, Any]) -> list[Target]:
    """The targets of the run; that of answers depends on the majority's score."""
    images = [
        Target(f"geneval_{task}", title, bound, None, f"geneval_{task}_ceiling", CEILING)
        for task, (title, bound) in GENEVAL.items()
    ]
    answers = metrics["vqa_majority"] + MARGIN
    return [
        *images,
        Target("caption_accuracy", "Captions, whole and true", 0.85,
               beside="caption_accuracy_ceiling", note=CEILING),
        Target("vqa_accuracy", "Answers", answers,
               beside="vqa_majority", note="the commonest training answer to that kind"),
        Target("dialogue_accuracy", "Replies in dialogues",
               beside="dialogue_majority", note="the commonest training reply"),
        Target("joint_agreement", "Image and caption at once: the caption is true of the image",
               beside="joint_agreement_floor", note="captions shuffled"),
    ]  # fmt: skip


def write(run: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write both reports from the files of the run and the markers of its job stages.

    Returns the content of `report.json`.
    """
    metrics = load_json(run / "evaluation" / "metrics.json")
    rows = [target.row(metrics) for target in targets(metrics)]
    training = stages["train"]["report"]
    report = metrics | {
        "samples_seen": training["samples_seen"],
        "samples_per_second": training["samples_per_second"],
        "wall_seconds": sum(stage["seconds"] for stage in stages.values()),
        "targets": reached(rows),
        "stages": {
            name: {"title": s["title"], "seconds": s["seconds"]} for name, s in stages.items()
        },
    }
    content = {
        "report": report,
        "metrics": metrics,
        "targets": rows,
        "target_chart": target_chart(rows),
        "tiles": load_tiles(run / "evaluation"),
        "tasks": {name: title for name, (title, _) in GENEVAL.items()},
        "bounds": _bounds(metrics),
        "losses": loss_charts(run / "train" / "metrics.jsonl"),
        "sources": load_json(run / "data" / MARKER)["sets"],
        "config": load_json(run / "train" / "export" / "config.json"),
    }
    write_report(run, render(Path(__file__).with_name("report.html.j2"), content), report)
    return report


def _bounds(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every share that has a floor or a ceiling, with both."""
    names = [name.removesuffix("_ceiling") for name in metrics if name.endswith("_ceiling")]
    return [
        {
            "name": name.replace("_", " "),
            "floor": metrics.get(f"{name}_floor"),
            "value": metrics.get(name),
            "ceiling": metrics[f"{name}_ceiling"],
            "real": metrics.get(f"{name}_real"),
        }
        for name in names
    ]
