"""Short causal depthwise convolution followed by SiLU, in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """silu(sum_k w_k x_{l - K + 1 + k} + bias), reset where `seq_idx` changes.

    Args:
        x: [b, l, channels].
        weight: [channels, 1, K].
        bias: [channels].
        seq_idx: [b, l] integers; taps reach only into the same sequence.

    Returns:
        [b, l, channels] in x's dtype.
    """
    length, taps = x.shape[1], weight.shape[-1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    w = weight.squeeze(1).T.to(x.dtype)  # [K, channels]
    y = torch.addcmul(bias.to(x.dtype), padded[:, taps - 1 :], w[-1])
    for k in range(taps - 1):
        shifted = padded[:, k : k + length]
        if seq_idx is not None:
            back = taps - 1 - k
            same = F.pad(seq_idx[:, back:] == seq_idx[:, :-back], (back, 0))[:, :length]
            shifted = shifted * same.unsqueeze(-1)
        y = torch.addcmul(y, shifted, w[k])
    return F.silu(y)
