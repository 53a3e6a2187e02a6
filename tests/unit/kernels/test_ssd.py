"""The chunked scan equals the recurrence, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.kernels.ssd import ssd, ssd_reference, zoh_scale


def inputs(b=2, length=13, h=4, p=3, g=2, n=5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype)

    return {
        "x": randn(b, length, h, p),
        "dt": torch.rand(b, length, h, dtype=dtype),
        "A": -torch.rand(h, dtype=dtype) - 0.1,
        "B": randn(b, length, g, n),
        "C": randn(b, length, g, n),
        "D": randn(h),
        "z": randn(b, length, h, p),
        "dt_bias": randn(h),
        "initial_states": randn(b, h, p, n),
    }


@given(length=st.integers(1, 40), chunk=st.integers(1, 48), packed=st.booleans())
@settings(max_examples=25, deadline=None)
def test_scan_equals_the_recurrence_at_any_length_and_chunk_size(length, chunk, packed):
    data = inputs(length=length)
    seq_idx = None
    if packed:
        position = torch.arange(length)
        starts = (position >= length // 3).long() + (position >= length - 2)
        seq_idx = starts.expand(2, -1)
    options = {"dt_softplus": True, "seq_idx": seq_idx, "return_final_states": True}
    y, state = ssd(**data, chunk_size=chunk, **options)
    y_ref, state_ref = ssd_reference(**data, chunk_size=chunk, **options)
    torch.testing.assert_close(y, y_ref, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), state_ref, rtol=1e-4, atol=1e-4)


def test_gradients_equal_those_of_the_recurrence():
    grads = []
    for function in (ssd, ssd_reference):
        data = {k: v.float().requires_grad_() for k, v in inputs().items()}
        y = function(**data, chunk_size=4, dt_softplus=True)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads.append({k: v.grad for k, v in data.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_bf16_inputs_accumulate_in_fp32():
    data = {k: v.to(torch.bfloat16) for k, v in inputs(length=64, dtype=torch.float32).items()}
    y = ssd(**data, chunk_size=16, dt_softplus=True)
    doubled = {k: v.double() for k, v in data.items()}
    exact = ssd_reference(**doubled, chunk_size=16, dt_softplus=True)
    assert y.dtype == torch.bfloat16
    # One rounding of the result to bf16 (8 bits), not one per token.
    error = (y.double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < 2**-7


def test_bf16_gradients_accumulate_in_fp32():
    data = {k: v.to(torch.bfloat16) for k, v in inputs(length=64, dtype=torch.float32).items()}
    weight = torch.linspace(-1, 1, data["x"].numel()).view_as(data["x"])
    grads = []
    for function, dtype in ((ssd, torch.bfloat16), (ssd_reference, torch.float64)):
        leaves = {k: v.detach().to(dtype, copy=True).requires_grad_() for k, v in data.items()}
        y = function(**leaves, chunk_size=16, dt_softplus=True)
        (y.double() * weight).sum().backward()
        grads.append({k: v.grad.double() for k, v in leaves.items()})
    for name, exact in grads[1].items():
        error = (grads[0][name] - exact).abs().max() / exact.abs().max()
        assert error < 2**-6, name


def test_packed_sequences_do_not_mix():
    data = inputs(length=12)
    del data["initial_states"]
    seq_idx = (torch.arange(12) >= 5).long().expand(2, -1)
    packed = ssd(**data, chunk_size=4, seq_idx=seq_idx)
    alone = {k: v[:, 5:] if v.dim() > 2 else v for k, v in data.items()}
    torch.testing.assert_close(packed[:, 5:], ssd(**alone, chunk_size=4), rtol=1e-5, atol=1e-5)


def test_zoh_scale_equals_eq_13():
    dt = torch.tensor([1e-8, 1e-3, 0.5, 20.0], dtype=torch.float64)
    A = torch.tensor(-1.5, dtype=torch.float64)
    expected = torch.expm1(dt * A) / (dt * A)
    torch.testing.assert_close(zoh_scale(dt, A), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dt", (2, 12, 4), r"dt has shape \(2, 12, 4\)"),
        ("A", (3,), r"A has shape \(3,\)"),
        ("B", (2, 13, 3, 5), r"groups must divide the 4 heads"),
        ("x", (2, 13, 12), r"must be \[batch, length, heads, headdim\]"),
        ("initial_states", (2, 4, 5, 3), r"initial_states has shape"),
        ("D", (3,), r"D has shape \(3,\).*needs \(4,\)"),
        ("D", (4, 2), r"D has shape \(4, 2\).*needs \(4, 3\)"),
        ("z", (2, 13, 4, 2), r"z has shape"),
        ("dt_bias", (1,), r"dt_bias has shape"),
        ("seq_idx", (2, 12), r"seq_idx has shape \(2, 12\).*needs \(2, 13\)"),
    ],
)
def test_errors_name_the_wrong_and_the_expected_shape(name, shape, message):
    data = inputs() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        ssd(**data, chunk_size=4)


def test_errors_name_wrong_dtypes_and_chunk_sizes():
    data = inputs()
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        ssd(**data | {"x": data["x"].long()}, chunk_size=4)
    with pytest.raises(ValueError, match=r"seq_idx is torch\.float32"):
        ssd(**data, seq_idx=torch.zeros(2, 13), chunk_size=4)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd(**data, chunk_size=0)
