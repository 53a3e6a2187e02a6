"""A user's mistake ends `pretrain.py` with one line, from however many ranks."""

import json
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.distributed
PRETRAIN = ROOT / "pipelines" / "pretrain.py"


def mistake(*args: str, ranks: int = 2) -> list[str]:
    """The lines that pretrain itself wrote, its exit code being 2."""
    code, output = run_ranks(PRETRAIN, ranks, *args)
    assert code != 0
    assert "exitcode  : 2" in output, output
    own, _, _ = output.partition("torch/distributed/elastic")
    assert "Traceback" not in own
    return [line for line in output.splitlines() if line.startswith("pretrain")]


def test_wrong_preset_and_flag():
    assert mistake("--preset", "dmeo") == [
        "pretrain.py: unknown preset 'dmeo'; did you mean 'demo'? "
        "(presets: demo, learn, dev_1gpu, mdm_1b, mdm_7b)"
    ]


def test_key_owned_by_the_configuration(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}))
    args = ["--preset", "demo", "--run_dir", str(tmp_path / "run"), "--train.deepspeed", str(path)]
    assert mistake(*args, ranks=1) == [
        f"pretrain: {path} sets 'gradient_clipping', which is owned by --train.grad_clip; remove it"
    ]


def test_missing_data(tmp_path):
    root = str(tmp_path / "nothing")
    args = ["--preset", "demo", "--run_dir", str(tmp_path / "run"), "--data.root", root]
    lines = mistake(*args, ranks=1)
    assert len(lines) == 1
    assert root in lines[0]
    assert not Path(root).exists()
