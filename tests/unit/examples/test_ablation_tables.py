"""Tables and charts of variants."""

import json
from pathlib import Path

import torch

from examples.digits.ablation_tables import (
    COLUMNS,
    runs_table,
    section,
    selection_table,
    solver_table,
)
from mdm.report.image_grid import save_sheet
from mdm.report.render import render
from tests.helpers import ROOT

TEMPLATE = ROOT / "examples/digits/report.html.j2"
RUNS = {
    "as shipped": [
        dict.fromkeys((*COLUMNS, "classifier_accuracy"), 0.5) | {"t2i_accuracy": accuracy}
        for accuracy in (0.8, 1.0)
    ],
    "unconditional <b>": [dict.fromkeys(COLUMNS, 0.1)],
}
SOLVERS = {
    "ddpm": {"5": {"t2i_accuracy": 0.25, "fid64": 3.0}, "10": {"t2i_accuracy": 0.5, "fid64": 2.0}}
}
SELECTIONS = {
    "0.0": {"t2i_accuracy": 0.9, "fid64": 1.0, "seconds": 2.0},
    "0.1": {"t2i_accuracy": 0.8, "fid64": 1.5, "seconds": 1.0},
}


def test_tables_have_mean_and_deviation() -> None:
    text = runs_table(RUNS)
    assert "| as shipped | 0.50 ± 0.00 | 0.90 ± 0.14 | 0.50 ± 0.00 |" in text
    assert "| unconditional <b> | 0.10 | 0.10 | 0.10 |" in text
    assert "| ddpm | 0.25 / 3.00 | 0.50 / 2.00 |" in solver_table(SOLVERS)
    assert "| off | 0.90 | 1.00 | 1.00 x |" in selection_table(SELECTIONS)
    assert "| 0.1 nats | 0.80 | 1.50 | 0.50 x |" in selection_table(SELECTIONS)


def test_the_page_shows_variants_solvers_and_images(tmp_path: Path) -> None:
    sheet = vars(save_sheet(torch.rand(3, 3, 8, 8), tmp_path / "a" / "p.png", columns=3))
    ablation = {
        "variants": RUNS,
        "sheets": {name: sheet | {"file": "a/p.png"} for name in RUNS},
        "flags": {"train_steps": 10, "seeds": 2},
        "solvers": SOLVERS,
        "selections": SELECTIONS,
    }
    shown = section(json.loads(json.dumps(ablation)), tmp_path)
    assert "real images" in shown["charts"][0]["svg"]
    assert "real images" in shown["solvers"][0]["svg"]
    metrics = {
        "samples_seen": 3,
        **dict.fromkeys(("wall_seconds", "samples_per_second"), 1.0),
        **dict.fromkeys(("t2i_accuracy", "i2t_accuracy", "joint_agreement", "n"), 0.5),
    }
    none: list[dict[str, object]] = []
    content = {
        "metrics": metrics,
        "targets": none,
        "target_chart": "",
        "tiles": {"drawn": none, "real": none, "described": none, "joint": none},
        "losses": none,
        "settings": {"guidance": 1.0},
        "ablation": shown,
    }
    page = render(TEMPLATE, content)
    assert "<h2>Ablations</h2>" in page
    assert "unconditional &lt;b&gt;" in page
    assert page.count("data:image/png;base64,") == 6
    assert "0.1 nats" in page
    assert "<h2>Ablations</h2>" not in render(TEMPLATE, content | {"ablation": None})
