"""The Mamba-2 mixer (Fig. 2 i), with the mixers of all scans of a block in one batched call.

Shapes: b batch, l length, s scans, d d_model, i inner width (expand x d), h heads, p headdim,
g groups (one), n state size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.kernels import conv, fused
from mdm.kernels import ssd as torch_ssd


class StackedLinear(nn.Module):
    """`n_scans` bias-free linear maps side by side; `weight` is [s, out, in]."""

    def __init__(self, n_scans: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_scans, d_out, d_in))
        nn.init.uniform_(self.weight, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in))

    def forward(self, x: Tensor) -> Tensor:
        """[b, l, s, in] -> [b, l, s, out]."""
        if self.weight.shape[0] == 1:
            return F.linear(x, self.weight[0])
        return torch.einsum("blsi,soi->blso", x, self.weight)


class StackedConv1d(nn.Module):
    """Depthwise convolutions: `weight` [s, channels, 1, taps], `bias` [s, channels]."""

    def __init__(self, n_scans: int, channels: int, taps: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(taps)
        self.weight = nn.Parameter(torch.empty(n_scans, channels, 1, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_scans, channels).uniform_(-bound, bound))


class StackedNorm(nn.Module):
    """Weights of `n_scans` gated RMS norms: `weight` [s, i]."""

    def __init__(self, n_scans: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_scans, width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """RMSNorm(y * silu(z)) over the last axis, in fp32; [b, l, s, i] each."""
        gated = (y * F.silu(z)).float()
        return (F.rms_norm(gated, gated.shape[-1:], eps=1e-5) * self.weight).to(y.dtype)


class Mamba2(nn.Module):
    """`n_scans` mixers; slice k of each parameter loads into a stock `mamba_ssm.Mamba2` by name."""

    def __init__(self, config: ModelConfig, n_scans: int) -> None:
        super().__init__()
        self.n_scans = n_scans
        self.headdim, self.d_state = config.headdim, config.d_state
        self.chunk_size = config.chunk_size
        self.zoh = config.discretization == "zoh"
        self.d_inner = config.expand * config.d_model
        self.n_heads = self.d_inner // config.headdim
        self.ssd: Callable[..., Any] = fused.ssd if config.kernel == "fused" else torch_ssd.ssd
        self.conv = fused.causal_conv if config.kernel == "fused" else conv.causal_conv

        channels = self.d_inner + 2 * config.d_state
        self.in_proj = StackedLinear(
            n_scans, config.d_model, self.d_inner + channels + self.n_heads
        )
        self.conv1d = StackedConv1d(n_scans, channels, config.d_conv)
        # dt starts log-uniform in [1e-3, 1e-1], A uniform in [1, 16] (mamba_ssm's choices).
        dt = torch.exp(torch.empty(n_scans, self.n_heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
        self.A_log = nn.Parameter(torch.empty(n_scans, self.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(n_scans, self.n_heads))
        self.norm = StackedNorm(n_scans, self.d_inner)
        self.out_proj = StackedLinear(n_scans, self.d_inner, config.d_model)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Mix along l, each scan with its own weights.

        Args:
            u: [b, l, s, d], already in each scan's order.
            seq_idx: [b, l] integers that keep packed texts apart.

        Returns:
            [b, l, s, d].
        """
        b, length, s, _ = u.shape
        z, xBC, dt = self.in_proj(u).split(
            [self.d_inner, self.d_inner + 2 * self.d_state, self.n_heads], -1
        )
        # Scans become further channels, heads and groups of one kernel call.
        weight, bias = self.conv1d.weight.flatten(0, 1), self.conv1d.bias.flatten(0, 1)
        xBC = self.conv(xBC.flatten(2), weight, bias, seq_idx).unflatten(2, (s, -1))
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], -1)
        x = x.reshape(b, length, s * self.n_heads, self.headdim)
        A = -self.A_log.float().exp().flatten()
        # The step sizes and the decay stay fp32 whatever the autocast.
        dt = F.softplus(dt.float() + self.dt_bias).flatten(2)
        held = x * torch_ssd.zoh_scale(dt, A).unsqueeze(-1).to(x.dtype) if self.zoh else x
        y = self.ssd(held, dt, A, B, C, chunk_size=self.chunk_size, seq_idx=seq_idx)
        y = y + x * self.D.flatten().unsqueeze(-1).to(x.dtype)
        y = self.norm(y.reshape(b, length, s, self.d_inner), z)
        out: Tensor = self.out_proj(y)
        return out
