"""Short causal depthwise convolution followed by SiLU, in torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm.kernels.ssd import check_seq_idx, check_tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """silu(sum_k w_k x_{l - K + 1 + k} + bias), reset where `seq_idx` changes.

    Args:
        x: [b, l, channels].
        weight: [channels, 1, K].
        bias: [channels].
        seq_idx: [b, l] integers; taps read only tokens of the same sequence.

    Returns:
        [b, l, channels] in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not match; the message gives both values.
    """
    check(x, weight, bias, seq_idx)
    y: Tensor = _CausalConv.apply(x, weight, bias, seq_idx)  # type: ignore[no-untyped-call]
    return y


def check(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> None:
    """Raise ValueError, with both values, if shapes or dtypes do not match."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [batch, length, channels]")
    if weight.dim() != 3 or not weight.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [channels, 1, taps]")
    channels = x.shape[-1]
    check_tensor("x", x, tuple(x.shape), x)
    check_tensor("weight", weight, (channels, 1, weight.shape[-1]), x)
    check_tensor("bias", bias, (channels,), x)
    check_seq_idx(seq_idx, x)


class _CausalConv(torch.autograd.Function):
    """A hand-written gradient, cheaper than autograd's through slices of a padded copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None
    ) -> Tensor:
        w, taps = _taps(weight, x.dtype), weight.shape[-1]
        mixed = torch.addcmul(bias.to(x.dtype), x, w[-1])
        for back in range(taps - 1, 0, -1):
            past = _mask_other_sequences(_shifted(x, back, taps), seq_idx, back)
            mixed = torch.addcmul(mixed, past, w[taps - 1 - back])
        ctx.save_for_backward(x, weight, seq_idx, mixed)
        return F.silu(mixed)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, seq_idx, mixed = ctx.saved_tensors
        w, taps = _taps(weight, x.dtype), weight.shape[-1]
        grad = torch.ops.aten.silu_backward(grad_y, mixed)
        grad_x = grad * w[-1]
        grad_w = [_sum_tokens(grad * x, weight)]
        for back in range(1, taps):
            masked = _mask_other_sequences(grad, seq_idx, back)
            grad_x = torch.addcmul(grad_x, _shifted(masked, -back, taps), w[taps - 1 - back])
            grad_w.append(_sum_tokens(masked * _shifted(x, back, taps), weight))
        grad_weight = torch.stack(grad_w[::-1], 1).unsqueeze(1)
        return grad_x, grad_weight, _sum_tokens(grad, weight), None


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[channels, 1, K] -> [K, channels].

    Stacked, not transposed: a compiler materializes the stack and then reads each tap contiguously,
    which makes the whole convolution three times as fast.
    """
    return torch.stack(weight.to(dtype).squeeze(1).unbind(1))


def _shifted(t: Tensor, back: int, taps: int) -> Tensor:
    """t_{l - back} along the second axis, zeros beyond the ends; |back| < taps."""
    width = taps - 1  # the same for every shift, so that a compiler pads only once
    padded = F.pad(t, (0, 0, width, 0) if back > 0 else (0, 0, 0, width))
    return padded[:, (width if back > 0 else 0) - back :][:, : t.shape[1]]


def _mask_other_sequences(t: Tensor, seq_idx: Tensor | None, back: int) -> Tensor:
    """Zero t where the token `back` positions earlier is in another sequence."""
    if seq_idx is None:
        return t
    same = F.pad(seq_idx[:, back:] == seq_idx[:, :-back], (back, 0))[:, : t.shape[1]]
    return t * same.unsqueeze(-1)


def _sum_tokens(t: Tensor, like: Tensor) -> Tensor:
    """Sum t [b, l, channels] over tokens in fp32; two steps keep one sequence in the cache."""
    wide = torch.promote_types(t.dtype, torch.float32)
    return t.sum(1, dtype=wide).sum(0).to(like.dtype)
