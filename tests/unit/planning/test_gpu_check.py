"""The parts of the GPU check that need no GPU: FLOPs, MFU, layers that fit, its table."""

import json
import types

import pytest
import torch

from mdm.config import Config, DataConfig, ModelConfig
from mdm.kernels import conv, ssd
from mdm.planning import gpu_check
from pipelines import gpu_check as job


@pytest.mark.parametrize(
    ("budget", "expected"), [(1000, 9), (10**6, 49), (300, 2), (299, 1), (199, 0), (0, 0)]
)
def test_layers_that_fit_follow_from_two_measurements(budget, expected):
    # 300 bytes with two layers, 500 with four: 100 a layer.
    assert gpu_check.layers_that_fit(budget, 300, 500, 49) == expected


def test_a_row_counts_three_forwards_a_step():
    line = gpu_check.row("x", 2, 0.5, 1000, 10**12, 12e12, 2**31)
    assert list(line) == ["what", "layers", "ms", "tokens/s", "MFU", "GiB"]
    assert line["tokens/s"] == 2000
    assert line["MFU"] == pytest.approx(0.5)
    assert line["GiB"] == 2
    assert gpu_check.row("x", 2, 0.5, 1000, 10**12, None, 0)["MFU"] is None


def test_the_table_is_aligned_and_shows_a_dash_for_none():
    text = gpu_check.table([{"what": "a long name", "MFU": None}, {"what": "b", "MFU": 1234.5}])
    assert text.splitlines() == [
        "what               MFU",
        "a long name          -",
        "b            1,234.500",
    ]


def test_differences_are_relative_to_the_largest_value():
    reference = [torch.tensor([0.0, 100.0]), torch.tensor([1.0])]
    close = [torch.tensor([0.9, 100.0]), torch.tensor([1.0])]
    assert gpu_check.compare("scan", torch.float32, close, reference)["passed"]
    far = [torch.tensor([1.1, 100.0]), torch.tensor([1.0])]
    assert not gpu_check.compare("scan", torch.float32, far, reference)["passed"]
    broken = [torch.tensor([float("nan"), 100.0]), torch.tensor([1.0])]
    assert not gpu_check.compare("scan", torch.float32, broken, reference)["passed"]


def test_without_a_gpu_it_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert job.main() == 0
    assert capsys.readouterr().out == "not run: no CUDA device\n"


class Stock(torch.nn.Linear):
    """Replaces `mamba_ssm.Mamba2`, which needs CUDA."""

    def __init__(self, d_model, d_state, headdim, expand, d_conv, chunk_size):
        super().__init__(d_model, d_model)


def test_the_whole_check_runs_with_replacements_for_cuda(monkeypatch, tmp_path, capsys):
    sizes = {"d_model": 32, "d_state": 8, "headdim": 16, "image_height": 2, "image_width": 2}
    model = ModelConfig(n_layer=3, vocab_size=50, n_classes=3, text_length=6, **sizes)
    separate = ModelConfig(
        n_layer=3, vocab_size=50, n_classes=3, text_length=6, scan_mode="separate", **sizes
    )
    data = DataConfig(caption_length=4, dialogue_length=6)
    presets = {
        "mdm_1b": Config(model=model, data=data),
        "mdm_7b": Config(model=separate, data=data),
    }
    monkeypatch.setattr(gpu_check, "PRESETS", presets)
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "install", lambda: None)
    monkeypatch.setattr(gpu_check.fused, "ssd", ssd.ssd)
    monkeypatch.setattr(gpu_check.fused, "causal_conv", conv.causal_conv)
    monkeypatch.setattr(gpu_check.fused, "stock_mixer", Stock)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    memory = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    out = tmp_path / "report.json"
    flags = ["--batch", "2", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["gpu_check", *flags])
    assert job.main() == 0
    report = json.loads(out.read_text())
    assert len(report["parity"]) == 8
    assert all(line["error"] == 0 for line in report["parity"])  # torch against itself
    assert [line["what"] for line in report["speed"]] == [
        f"{name} {what}"
        for name in presets
        for what in ("block", "block, stock mixers", "training", "training, stock mixers")
    ]
    assert all(line["layers"] in (1, 3) and line["MFU"] > 0 for line in report["speed"])
    assert "mdm_7b training" in capsys.readouterr().out

    def wrong(*args, **options):
        result = ssd.ssd(*args, **options)
        return (1.2 * result[0], result[1]) if isinstance(result, tuple) else result

    monkeypatch.setattr(gpu_check, "MEASURED", ("mdm_1b",))
    monkeypatch.setattr(gpu_check.fused, "ssd", wrong)
    assert job.main() == 1
