"""The report of `make learn`: `report.json` for programs, `report.html` for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.digits.ablation_tables import section
from examples.digits.evaluation import Drawn, Task
from mdm.evaluate.suite import Label
from mdm.report.image_grid import save_sheet
from mdm.report.page import Target, loss_charts, render, tiles, write_report
from mdm.utils.files import load_json, read_json, read_lines, write_json

SHOWN = 100  # tiles of a sheet
SHEETS = "sheets.json"


def targets(metrics: Mapping[str, Any]) -> list[Target]:
    """What the run should reach; floors come from the same run."""
    return [
        Target("t2i_accuracy", "Caption → image, guided", at_least=0.95,
               beside="classifier_accuracy", note="ceiling: real held-out images"),
        Target("t2i_accuracy_unguided", "Caption → image, not guided"),
        Target("shuffled_control", "The same with captions dealt out anew", at_most=0.2),
        Target("i2t_accuracy", "Held-out image → caption", at_least=0.97),
        Target("joint_agreement", "Both at once: caption names the image", at_least=0.90),
        Target("class_share_min", "Rarest class, of its even share", at_least=0.5),
        Target("class_share_max", "Commonest class, of its even share", at_most=2.0),
        Target("recall", "Recall, k = 3", at_least=0.75 * metrics["recall_floor"],
               beside="recall_floor", note="other real images of the same number"),
        Target("precision", "Precision, k = 3",
               beside="precision_floor", note="other real images of the same number"),
        Target("fid64", "Fréchet distance in 64 features", at_most=2 * metrics["fid64_floor"],
               beside="fid64_floor", note="other real images of the same number"),
    ]  # fmt: skip


def save_sheets(task: Task, drawn: Drawn, wanted: Sequence[int], folder: Path) -> None:
    """Save the tiles of everything drawn, with what the classifier and the captions say of them."""
    named = task.names.named
    parts = {
        "drawn": (
            drawn.images,
            [
                Label(text, "", seen == c)
                for text, seen, c in zip(drawn.captions, drawn.seen, wanted, strict=True)
            ],
        ),
        "described": (
            task.real,
            [
                Label(text, task.names.names[c][0], named(text) == c)
                for text, c in zip(drawn.described, task.labels.tolist(), strict=True)
            ],
        ),
        "joint": (
            drawn.joint_images,
            [
                Label(text, "", named(text) == seen)
                for text, seen in zip(drawn.joint_captions, drawn.joint_seen, strict=True)
            ],
        ),
        "real": (task.real, [Label("") for _ in task.real]),
    }
    found, labels = {}, {}
    for name, (images, marks) in parts.items():
        found[name] = vars(save_sheet(images[:SHOWN], folder / f"{name}.png", columns=10))
        labels[name] = [vars(mark) for mark in marks[:SHOWN]]
    write_json(folder / SHEETS, {"sheets": found, "labels": labels})


def write(
    run: Path, metrics: Mapping[str, Any], task: Task, drawn: Drawn, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write both reports into `run`, whose `train` folder holds the training job; the JSON."""
    shares = metrics["class_shares"]
    numbers = {**metrics, "class_share_min": min(shares), "class_share_max": max(shares)}
    rows = [target.row(numbers) for target in targets(numbers)]
    wanted = [i % len(task.names) for i in range(len(drawn.seen))]
    plain = numbers | {
        "targets": {row["metric"]: row["ok"] for row in rows if row["ok"] is not None},
        "settings": dict(settings),
    }
    save_sheets(task, drawn, wanted, run / "sheets")
    write_page(run, plain)
    return plain


def write_page(run: Path, plain: Mapping[str, Any]) -> None:
    """Write the page of what lies in `run`, with the ablation's part if there is one."""
    metrics = {k: v for k, v in plain.items() if k not in ("targets", "settings")}
    lines = read_lines(run / "train" / "metrics.jsonl", {"step": float, "samples_seen": float})
    drawn = load_json(run / "sheets" / SHEETS)
    ablation = run / "ablate" / "ablate.json"
    compared = read_json(ablation, {"variants": dict, "sheets": dict})
    content = {
        "metrics": metrics,
        "targets": [target.row(metrics) for target in targets(metrics)],
        "tiles": tiles(drawn["sheets"], drawn["labels"], run / "sheets"),
        "losses": loss_charts(lines),
        "settings": plain["settings"],
        "ablation": section(compared, ablation.parent) if compared else None,
    }
    write_report(run, render(Path(__file__).with_name("report.html.j2"), content), plain)
