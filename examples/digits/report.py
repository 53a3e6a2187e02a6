"""The report of `make learn`: `report.json` for programs, `report.html` for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.digits.ablation_tables import section
from mdm.evaluate.suite import Label
from mdm.report.page import (
    Target,
    load_tiles,
    loss_charts,
    reached,
    save_tiles,
    target_chart,
    write_report,
)
from mdm.report.render import render
from mdm.utils.files import read_json

SHOWN = 100  # tiles of a sheet
OTHER_REAL = "equally many other real images"


def targets(metrics: Mapping[str, Any]) -> list[Target]:
    """The targets of the run; those of distances depend on the floors of the same run."""
    least_recall, most_fid = 0.9 * metrics["recall_floor"], 1.2 * metrics["fid64_floor"]
    return [
        Target("t2i_accuracy", "Caption → image, guided", at_least=0.98,
               beside="classifier_accuracy", note="ceiling: real held-out images"),
        Target("t2i_accuracy_unguided", "Caption → image, not guided"),
        Target("shuffled_control", "Caption → image, captions shuffled", at_most=0.2),
        Target("i2t_accuracy", "Held-out image → caption", at_least=0.98),
        Target("joint_agreement", "Both at once: caption names the image", at_least=0.95),
        Target("class_share_min", "Rarest class, over an even share", at_least=0.5, share=False),
        Target("class_share_max", "Commonest class, over an even share", at_most=2, share=False),
        Target("recall", "Recall, k = 3", at_least=least_recall, beside="recall_floor",
               note=OTHER_REAL),
        Target("precision", "Precision, k = 3", beside="precision_floor", note=OTHER_REAL),
        Target("fid64", "Fréchet distance in 64 features", at_most=most_fid, beside="fid64_floor",
               note=OTHER_REAL, share=False),
    ]  # fmt: skip


def write(
    run: Path,
    metrics: Mapping[str, Any],
    images: Mapping[str, Tensor],
    labels: Mapping[str, Sequence[Label]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write both reports into `run`, whose folder `train` is the training run's.

    Returns the content of `report.json`.
    """
    shares = metrics["class_shares"]
    metrics = {**metrics, "class_share_min": min(shares), "class_share_max": max(shares)}
    rows = [target.row(metrics) for target in targets(metrics)]
    report = metrics | {"targets": reached(rows), "settings": dict(settings)}
    save_tiles(images, labels, run / "sheets", SHOWN)
    write_page(run, report)
    return report


def write_page(run: Path, report: Mapping[str, Any]) -> None:
    """Write `report.html` and `report.json`, with the ablations if there are any."""
    metrics = {k: v for k, v in report.items() if k not in ("targets", "settings")}
    rows = [target.row(metrics) for target in targets(metrics)]
    folder = run / "ablate"
    ablation = read_json(folder / "ablate.json", {"variants": dict, "sheets": dict})
    content = {
        "metrics": metrics,
        "targets": rows,
        "target_chart": target_chart(rows),
        "tiles": load_tiles(run / "sheets"),
        "losses": loss_charts(run / "train" / "metrics.jsonl"),
        "settings": report["settings"],
        "ablation": section(ablation, folder) if ablation else None,
    }
    write_report(run, render(Path(__file__).with_name("report.html.j2"), content), report)
