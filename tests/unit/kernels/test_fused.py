"""mamba_ssm's Triton kernels, interpreted on the CPU, equal ours: outputs and all gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdm.kernels import fused
from tests.helpers import ROOT
from tests.interpreter import ENVIRONMENT

TOLERANCE = {"scan": 1e-4, "packed scan": 1e-4, "half scan": 4e-3, "mixer": 1e-4}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    out: Path = tmp_path_factory.mktemp("interpreted") / "results.pt"
    command = [sys.executable, "-m", "tests.unit.kernels.interpreted_job", str(out)]
    job = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert job.returncode == 0, job.stdout[-4000:]
    return torch.load(out)


@pytest.mark.parametrize("case", TOLERANCE)
def test_outputs_and_gradients_equal_mamba_ssm(results, case):
    for name, (theirs, ours) in results[case].items():
        assert theirs.dtype == ours.dtype, name
        error = (theirs.double() - ours.double()).abs().max() / theirs.double().abs().max()
        assert error < TOLERANCE[case], f"{name} differs by {error:.1e} of its largest value"


class Recorder:
    """Replaces the CUDA kernel of causal-conv1d and records its arguments."""

    def __call__(self, x, weight, bias, seq_idx, activation):
        self.x, self.weight, self.bias, self.seq_idx = x, weight, bias, seq_idx
        assert activation == "silu"
        return torch.zeros_like(x)


def test_convolution_passes_the_layout_that_causal_conv1d_documents(monkeypatch):
    # The kernel requires x [b, channels, l], with contiguous channels if seq_idx is given, weight
    # [channels, taps], and seq_idx contiguous int32 [b, l].
    kernel = Recorder()
    module = type(sys)("causal_conv1d")
    module.causal_conv1d_fn = kernel
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    x = torch.randn(9, 2, 16).transpose(0, 1)  # not contiguous
    seq_idx = torch.tensor([[4] * 5 + [7] * 4]).expand(2, -1)
    y = fused.causal_conv(x, torch.randn(16, 1, 4), torch.randn(16), seq_idx)
    assert y.shape == (2, 9, 16)
    assert kernel.x.shape == (2, 16, 9)
    assert kernel.x.stride(1) == 1
    assert kernel.x.stride(2) % 8 == kernel.x.stride(0) % 8 == 0
    assert kernel.weight.shape == (16, 4)
    assert kernel.seq_idx.dtype == torch.int32
    assert kernel.seq_idx.is_contiguous()
    assert kernel.seq_idx[0].tolist() == [0] * 5 + [3] * 4


def test_wrong_shapes_are_rejected_before_the_kernel_is_called():
    x = torch.zeros(2, 5, 4, 8)
    B = torch.zeros(2, 5, 1, 8)
    with pytest.raises(ValueError, match=r"dt has shape \(2, 4, 4\).*needs \(2, 5, 4\)"):
        fused.ssd(x, torch.zeros(2, 4, 4), torch.zeros(4), B, B, chunk_size=4)
