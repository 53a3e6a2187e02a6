"""A user's mistake ends `pretrain.py` with one line, on any number of ranks."""

import json
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.distributed
PRETRAIN = ROOT / "pipelines" / "pretrain.py"


def lines_of_refusal(*args: str, ranks: int = 2) -> list[str]:
    """Run pretrain, which must exit with code 2; returns the lines that it printed itself."""
    code, output = run_ranks(PRETRAIN, ranks, *args)
    assert code != 0
    assert "exitcode  : 2" in output, output
    own_output, _, _ = output.partition("torch/distributed/elastic")
    assert "Traceback" not in own_output
    return [line for line in output.splitlines() if line.startswith("pretrain")]


def test_an_unknown_preset_is_refused_with_a_suggestion():
    assert lines_of_refusal("--preset", "dmeo") == [
        "pretrain.py: unknown preset 'dmeo'; did you mean 'demo'? "
        "(presets: demo, learn, scenes, learn_text, dev_1gpu, mdm_1b, mdm_7b)"
    ]


def test_a_deepspeed_key_owned_by_a_flag_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}))
    args = ["--preset", "demo", "--run_dir", str(tmp_path / "run"), "--train.deepspeed", str(path)]
    assert lines_of_refusal(*args, ranks=1) == [
        f"pretrain: {path} sets 'gradient_clipping', which is owned by --train.grad_clip; remove it"
    ]


def test_missing_data_is_refused_and_creates_no_folder(tmp_path):
    root = str(tmp_path / "nothing")
    args = ["--preset", "demo", "--run_dir", str(tmp_path / "run"), "--data.root", root]
    lines = lines_of_refusal(*args, ranks=1)
    assert len(lines) == 1
    assert root in lines[0]
    assert not Path(root).exists()
