"""The attention block is grouped-query attention, as large as the Mamba-2 block it replaces."""

import dataclasses

import pytest
import torch

from mdm.config import ModelConfig
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Decoder
from mdm.model.sequence import Order
from mdm.presets import MDM_1B

SMALL = ModelConfig(d_model=32, n_layer=1, d_state=8, headdim=16, n_heads=4, n_kv_heads=2)


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """A head's 8 numbers as 4 complex ones, each turned by its own angle for the position."""
    angles = torch.tensor([position * 10_000 ** (-i / 4) for i in range(4)])
    numbers = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(4), angles)
    return torch.cat([numbers.real, numbers.imag], -1)


def test_attention_is_softmax_over_shared_keys_at_rotary_positions():
    torch.manual_seed(0)
    block = AttentionBlock(SMALL, 1)
    x, positions = torch.randn(2, 7, 32), [3, 0, 4, 11, 2, 6, 5]
    heads = []
    for h in range(4):
        own, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
        q = x @ block.q_proj.weight[own].T
        k, v = (x @ p.weight[shared].T for p in (block.k_proj, block.v_proj))
        q, k = (
            torch.stack([turned(t[:, i], p) for i, p in enumerate(positions)], 1) for t in (q, k)
        )
        heads.append((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v)
    expected = torch.cat(heads, -1)
    attended = block._attend(x, torch.tensor(positions), None)
    torch.testing.assert_close(attended, expected)
    weights = (block.q_proj.weight, block.k_proj.weight, block.v_proj.weight)
    ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (attended, expected))
    torch.testing.assert_close(ours, theirs)


def test_packed_sequences_do_not_mix():
    block = AttentionBlock(SMALL, 1)
    a, b = torch.randn(1, 3, 32), torch.randn(1, 4, 32)
    packed = block(torch.cat([a, b], 1), seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    torch.testing.assert_close(packed, torch.cat([block(a), block(b)], 1))


def test_attention_knows_distances_and_directions():
    torch.manual_seed(0)
    block = AttentionBlock(SMALL, 1)
    x, order = torch.randn(2, 7, 32), torch.randperm(7)
    assert not torch.allclose(block(x)[:, order], block(x[:, order]), atol=1e-4)
    at = Order(order, order, position=order + 5)  # the tokens where they were, five later
    torch.testing.assert_close(block(x)[:, order], block(x[:, order], at))


@pytest.mark.parametrize("mode", ["alternate", "separate"])
def test_trunks_have_equal_parameters(mode):
    model = dataclasses.replace(MDM_1B.model, scan_mode=mode, n_layer=4)
    sizes = []
    for decoder in ("mamba", "transformer"):
        with torch.device("meta"):
            trunk = Decoder(dataclasses.replace(model, decoder=decoder)).trunk
        sizes.append(sum(p.numel() for p in trunk.parameters()))
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_attention_larger_than_its_model_is_refused():
    narrow = dataclasses.replace(SMALL, expand=1, headdim=8, d_state=1, n_kv_heads=4)
    with pytest.raises(ValueError, match=r"attention has 4096 parameters.*set model\.d_ff"):
        AttentionBlock(narrow, 1)
    assert AttentionBlock(dataclasses.replace(narrow, d_ff=24), 1).up_proj.out_features == 24
