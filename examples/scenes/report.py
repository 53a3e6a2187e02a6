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
    target_chart,
    write_report,
)
from mdm.report.render import render
from mdm.utils.files import load_json

CEILING = "ceiling: real scenes after the autoencoder, read by the judge"
TASKS = {
    "single": "One digit",
    "colours": "Its colour",
    "two": "Two digits",
    "counting": "Number of digits",
    "position": "Where two digits stand",
    "attribution": "Colours of two digits",
}
ENOUGH = {  # in an hour on two cores
    "geneval_single": 0.95,
    "geneval_colours": 0.9,
    "geneval_two": 0.7,
    "geneval_counting": None,
    "geneval_position": 0.8,
    "geneval_attribution": 0.6,
    "caption_accuracy": 0.85,
}
MARGIN = 0.2  # of answers above the majority's


def targets(metrics: Mapping[str, Any], enough: Mapping[str, float | None]) -> list[Target]:
    """The targets of a run, with the least share of each; that of answers follows the majority."""
    titles = {f"geneval_{task}": title for task, title in TASKS.items()}
    titles["caption_accuracy"] = "Captions, whole and true"
    shares = [
        Target(name, title, enough[name], None, f"{name}_ceiling", CEILING)
        for name, title in titles.items()
    ]
    joint = Target(
        "joint_agreement",
        "Image and caption at once: the caption is true of the image",
        beside="joint_agreement_floor",
        note="captions shuffled",
    )
    return [
        *shares,
        Target("vqa_accuracy", "Answers", metrics["vqa_majority"] + MARGIN,
               beside="vqa_majority", note="the commonest training answer to that kind"),
        Target("dialogue_accuracy", "Replies in dialogues",
               beside="dialogue_majority", note="the commonest training reply"),
        *([joint] if "joint_agreement" in metrics else []),
    ]  # fmt: skip


def write(run: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write both reports from the files of the run and the markers of its job stages.

    Returns the content of `report.json`.
    """
    metrics = load_json(run / "evaluation" / "metrics.json")
    rows = [target.row(metrics) for target in targets(metrics, ENOUGH)]
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
        "tasks": TASKS,
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
