"""What stays in fp32 under bf16 autocast: against the same numbers in fp64."""

import dataclasses

import pytest
import torch

from mdm.diffusion.score_entropy import energy, log_ratio_vocabulary
from mdm.kernels.ssd import ssd
from mdm.model import decoder as decoder_module
from mdm.model import mamba2
from mdm.model.decoder import Prediction
from mdm.model.mdm import text_logits
from mdm.utils.precision import autocast
from tests.unit.model.test_decoder import SMALL, call, trained

ROUNDING = {"rtol": 2e-5, "atol": 2e-5}  # of fp32; that of bf16 is 4e-3


def in_bf16(function, *inputs):
    with torch.no_grad(), autocast("bf16"):
        return function(*inputs)


def test_the_noise_level_and_its_modulation():
    embed = trained(SMALL).embed
    levels = torch.linspace(-20, 20, 41)
    level = in_bf16(embed.level, levels)
    modulation = in_bf16(embed._modulate, level)
    assert level.dtype == modulation.dtype == torch.float32
    embed.double()
    first, _, last = embed.level.mlp
    phase = levels.double().unsqueeze(-1) * embed.level.frequencies
    hidden = torch.cat([phase.sin(), phase.cos()], -1) @ first.weight.T + first.bias
    exact = torch.nn.functional.silu(hidden) @ last.weight.T + last.bias
    torch.testing.assert_close(level.double(), exact, **ROUNDING)
    exact = torch.nn.functional.silu(exact) @ embed.modulation.weight.T + embed.modulation.bias
    torch.testing.assert_close(modulation.double(), exact, **ROUNDING)


def test_the_vocabulary_logits():
    torch.manual_seed(0)
    h, means, bias = torch.randn(2, 5, 16) * 30, torch.randn(50, 16), torch.randn(50)
    pieces = torch.randn(2, 5, 50)
    logits = in_bf16(text_logits, Prediction(None, h, pieces), means, bias)
    assert logits.abs().max() > 100
    exact = h.double() @ means.double().T + bias + pieces
    torch.testing.assert_close(logits.double(), exact, **ROUNDING)


def test_the_full_rank_text_head():
    network = trained(SMALL)
    read = []
    network.piece_out.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    pieces = in_bf16(call, network, torch.randn(2, 5, 16), torch.randn(2, 6, 16)).pieces
    exact = read[0].double() @ network.piece_out.weight.double().T
    torch.testing.assert_close(pieces.double(), exact, **ROUNDING)


def test_energies():
    torch.manual_seed(0)
    z_t, y, abar = torch.randn(4, 16), torch.randn(9, 16), torch.full((4,), 0.9)
    shared = y.expand(4, 9, 16)
    exact = energy(z_t.double(), shared.double(), abar.double(), torch.zeros(4, 16))
    for computed in (
        in_bf16(log_ratio_vocabulary, z_t, y, abar),
        in_bf16(energy, z_t, shared, abar, torch.zeros(4, 16)),
    ):
        assert computed.dtype == torch.float32
        torch.testing.assert_close(computed, exact.float(), rtol=1e-4, atol=1e-3)


def test_the_gain_of_eq_17():
    network = trained(dataclasses.replace(SMALL, eq17_logits=True))
    level = torch.linspace(-7, 4, 12)
    gain = in_bf16(network._eq17, level)
    embedded = network.embed.level(level).double()
    exact = embedded @ network.eq17_gain.weight.double().T + network.eq17_gain.bias
    factor = level.double().sigmoid().sqrt() / (-level.double()).sigmoid()
    torch.testing.assert_close(gain.double(), exact.squeeze(-1) * factor, **ROUNDING)


def test_the_statistics_of_norms(monkeypatch):
    normed = []
    real = decoder_module.F.rms_norm

    def watched(x, *args, **kwargs):
        normed.append(x.dtype)
        return real(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", watched)
    for changes in ({}, {"decoder": "transformer", "n_heads": 4, "n_kv_heads": 2}):
        network = trained(dataclasses.replace(SMALL, **changes))
        in_bf16(call, network, torch.randn(2, 5, 16), torch.randn(2, 6, 16))
    assert len(normed) == 4 * 2 + 1 + 4 * 2 + 1
    assert set(normed) == {torch.float32}


@pytest.mark.parametrize("zoh", [True, False])
def test_step_sizes_and_decay(monkeypatch, zoh):
    scanned = []

    def watched(x, dt, A, *args, **kwargs):
        scanned.append((dt, A))
        return ssd(x, dt, A, *args, **kwargs)

    monkeypatch.setattr(mamba2.torch_ssd, "ssd", watched)
    network = trained(dataclasses.replace(SMALL, discretization="zoh" if zoh else "euler"))
    in_bf16(call, network, torch.randn(2, 5, 16), torch.randn(2, 6, 16))
    for block, (dt, A) in zip(network.trunk.blocks, scanned, strict=True):
        assert dt.dtype == A.dtype == torch.float32
        exact = -block.mixer.A_log.double().exp().flatten()
        torch.testing.assert_close(A.double(), exact, **ROUNDING)
        # The sum with the bias is taken after the bf16 product, in fp32: it is on no bf16 grid.
        assert not torch.equal(dt, dt.bfloat16().float())
