"""The mixer equals transformers' with the same weights, and its stacked scans equal one by one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from mdm.config import ModelConfig
from mdm.model.mamba2 import Mamba2, mix

SMALL = ModelConfig(d_model=32, n_layer=1, d_state=16, headdim=16, chunk_size=8, n_classes=3)


def perturbed(config: ModelConfig, n_scans: int) -> Mamba2:
    torch.manual_seed(0)
    mixer = Mamba2(config, n_scans)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def run(mixer: Mamba2, u: torch.Tensor, seq_idx: torch.Tensor | None = None) -> torch.Tensor:
    return mix(u, mixer.weights, seq_idx, **mixer.settings)


def naive(mixer: Mamba2, u: torch.Tensor, discretization: str) -> torch.Tensor:
    """Slice 0 of the mixer token by token in fp64, Eqs. 10-13; u [b, l, d]."""
    w = {name: p[0].double() for name, p in mixer.state_dict().items()}
    heads, inner = len(w["D"]), len(w["norm.weight"])
    n = (len(w["conv1d.bias"]) - inner) // 2
    z, xBC, dt = (u.double() @ w["in_proj.weight"].T).split([inner, inner + 2 * n, heads], -1)
    dt = F.softplus(dt + w["dt_bias"])
    A = -w["A_log"].exp()
    state = torch.zeros(len(u), heads, inner // heads, n, dtype=torch.float64)
    rows = []
    for i in range(u.shape[1]):
        mixed = w["conv1d.bias"].expand(len(u), -1)
        for k in range(4):
            if i - 3 + k >= 0:
                mixed = mixed + w["conv1d.weight"][:, 0, k] * xBC[:, i - 3 + k]
        x, B, C = F.silu(mixed).split([inner, n, n], -1)
        x = x.unflatten(1, (heads, -1))
        decay = (dt[:, i] * A).exp()
        written = dt[:, i] if discretization == "euler" else (decay - 1) / A
        added = written[..., None, None] * x.unsqueeze(-1) * B[:, None, None]
        state = decay[..., None, None] * state + added
        y = (state * C[:, None, None]).sum(-1) + w["D"].unsqueeze(-1) * x
        gated = y.flatten(1) * F.silu(z[:, i])
        normed = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        rows.append(normed * w["norm.weight"] @ w["out_proj.weight"].T)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
def test_equals_the_naive_recurrence(discretization):
    mixer = perturbed(dataclasses.replace(SMALL, discretization=discretization), 1)
    u = torch.randn(2, 21, 32)
    ours = run(mixer, u.unsqueeze(2)).squeeze(2)
    expected = naive(mixer, u, discretization)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_equals_transformers_mixer():
    ours = perturbed(dataclasses.replace(SMALL, discretization="euler"), 1)
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=32, state_size=16, head_dim=16, num_heads=4, n_groups=1, chunk_size=8
        ),
        layer_idx=0,
    )
    theirs.load_state_dict({name: p[0] for name, p in ours.state_dict().items()}, strict=True)
    x = torch.randn(2, 21, 32)
    results = []
    for module in (ours, theirs):
        u = x.clone().requires_grad_()
        y = run(ours, u.unsqueeze(2)).squeeze(2) if module is ours else module(u)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append({"y": y, "u": u.grad} | grads)
    for name, reference in results[1].items():
        value = results[0][name].view_as(reference)
        torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4, msg=name)


# Parameters of `mamba_ssm.Mamba2(d_model=32, d_state=16, headdim=16)`, by name.
STOCK = {
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "in_proj.weight": (164, 32),
    "conv1d.weight": (96, 1, 4),
    "conv1d.bias": (96,),
    "norm.weight": (64,),
    "out_proj.weight": (32, 64),
}


def test_a_slice_has_the_names_and_shapes_of_a_stock_mixer():
    state = Mamba2(SMALL, 6).state_dict()
    assert {name: tuple(p[5].shape) for name, p in state.items()} == STOCK


def test_packed_texts_do_not_mix():
    mixer = perturbed(SMALL, 2)
    u = torch.randn(1, 15, 2, 32)
    seq_idx = (torch.arange(15) >= 6).long()[None]
    packed = run(mixer, u, seq_idx)
    torch.testing.assert_close(packed[:, :6], run(mixer, u[:, :6]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 6:], run(mixer, u[:, 6:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
def test_stacked_scans_equal_single_ones(discretization):
    config = dataclasses.replace(SMALL, discretization=discretization)
    stacked = perturbed(config, 3)
    x = torch.randn(2, 9, 3, 32)
    together = run(stacked, x)
    for k in range(3):
        single = Mamba2(config, 1)
        single.load_state_dict({n: p[k : k + 1] for n, p in stacked.state_dict().items()})
        torch.testing.assert_close(together[:, :, k : k + 1], run(single, x[:, :, k : k + 1]))


def test_discretizations_differ_but_agree_for_small_steps():
    euler = perturbed(dataclasses.replace(SMALL, discretization="euler"), 1)
    zoh = Mamba2(dataclasses.replace(SMALL, discretization="zoh"), 1)
    zoh.load_state_dict(euler.state_dict())
    x = torch.randn(1, 7, 1, 32)
    assert (run(euler, x) - run(zoh, x)).abs().max() > 1e-3
    with torch.no_grad():
        for mixer in (euler, zoh):
            mixer.dt_bias.fill_(-14.0)
            mixer.in_proj.weight[:, -4:] = 0
    torch.testing.assert_close(run(euler, x), run(zoh, x), rtol=1e-3, atol=1e-4)


def test_fused_kernel_missing_raises_with_the_way_out():
    if torch.cuda.is_available():
        pytest.skip("the fused kernel may be installed here")
    mixer = Mamba2(dataclasses.replace(SMALL, kernel="fused"), 1)
    with pytest.raises(ImportError, match=r"model\.kernel is 'fused'.*--model\.kernel torch"):
        run(mixer, torch.randn(1, 4, 1, 32))
