"""The short convolution equals torch's, and never reaches into another text."""

import torch
import torch.nn.functional as F

from mdm.kernels.conv import causal_conv


def test_equals_conv1d():
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 9, 6), torch.randn(6, 1, 4), torch.randn(6)
    expected = F.silu(F.conv1d(x.transpose(1, 2), w, b, padding=3, groups=6)[..., :9])
    torch.testing.assert_close(causal_conv(x, w, b), expected.transpose(1, 2))


def test_seq_idx_resets_the_taps():
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 9, 6), torch.randn(6, 1, 4), torch.randn(6)
    seq_idx = (torch.arange(9) >= 4).long()[None]
    packed = causal_conv(x, w, b, seq_idx)
    torch.testing.assert_close(packed[:, 4:], causal_conv(x[:, 4:], w, b))
    torch.testing.assert_close(packed[:, :4], causal_conv(x[:, :4], w, b))
