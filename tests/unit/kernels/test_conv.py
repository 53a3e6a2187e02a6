"""The short convolution equals torch's and never mixes sequences."""

import pytest
import torch
import torch.nn.functional as F

from mdm.kernels.conv import causal_conv


def test_convolution_equals_conv1d():
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 9, 6), torch.randn(6, 1, 4), torch.randn(6)
    expected = F.silu(F.conv1d(x.transpose(1, 2), w, b, padding=3, groups=6)[..., :9])
    torch.testing.assert_close(causal_conv(x, w, b), expected.transpose(1, 2))


def test_taps_stay_within_their_sequence():
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 9, 6), torch.randn(6, 1, 4), torch.randn(6)
    seq_idx = (torch.arange(9) >= 4).long()[None]
    packed = causal_conv(x, w, b, seq_idx)
    torch.testing.assert_close(packed[:, 4:], causal_conv(x[:, 4:], w, b))
    torch.testing.assert_close(packed[:, :4], causal_conv(x[:, :4], w, b))


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_numerical_derivatives(length, packed):
    torch.manual_seed(0)
    shapes = ((2, length, 3), (3, 1, 4), (3,))
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    seq_idx = (torch.arange(length) >= 4).long().expand(2, -1) if packed else None
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, seq_idx), inputs)


def test_bf16_gradients_accumulate_in_fp32():
    torch.manual_seed(0)
    x = torch.randn(4, 500, 6).bfloat16()
    w, b = torch.randn(6, 1, 4), torch.randn(6)
    grad = torch.randn(4, 500, 6).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_()]
        leaves += [
            t.clone().to(torch.promote_types(dtype, t.dtype)).requires_grad_() for t in (w, b)
        ]
        y = causal_conv(*leaves)
        assert y.dtype == dtype
        results.append(torch.autograd.grad(y, leaves, grad.to(dtype)))
    for ours, exact in zip(*results, strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-7  # accumulated in bf16, sums of 2,000 terms have ten times that


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 9)}, r"x has shape \(2, 9\); it must be \[batch"),
        ({"weight": (5, 1, 4)}, r"weight has shape \(5, 1, 4\).*needs \(6, 1, 4\)"),
        ({"weight": (6, 4)}, r"must be \[channels, 1, taps\]"),
        ({"bias": (1,)}, r"bias has shape \(1,\).*needs \(6,\)"),
        ({"seq_idx": (2, 8)}, r"seq_idx has shape \(2, 8\).*needs \(2, 9\)"),
    ],
)
def test_errors_name_the_wrong_and_the_expected_shape(change, message):
    shapes = {"x": (2, 9, 6), "weight": (6, 1, 4), "bias": (6,)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv(**{name: torch.zeros(shape) for name, shape in shapes.items()})
