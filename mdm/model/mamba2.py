"""The Mamba-2 mixer (Fig. 2 i), with the mixers of all scans of a block in one batched call.

Shapes: b batch, l length, s scans, d d_model, i inner width (expand x d), h heads, p headdim,
n state size (one group), k taps.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.kernels import conv, fused
from mdm.kernels import ssd as torch_ssd


class Weights(NamedTuple):
    """One block's parameters, as `mamba_ssm.Mamba2` names them, each with a leading scan axis."""

    in_proj: Tensor  # [s, 2i + 2n + h, d]
    conv1d_weight: Tensor  # [s, i + 2n, 1, k]
    conv1d_bias: Tensor  # [s, i + 2n]
    dt_bias: Tensor  # [s, h]
    A_log: Tensor  # [s, h]
    D: Tensor  # [s, h]
    norm: Tensor  # [s, i]
    out_proj: Tensor  # [s, d, i]


def mix(
    u: Tensor,
    w: Weights,
    seq_idx: Tensor | None,
    *,
    d_state: int,
    headdim: int,
    chunk_size: int,
    zoh: bool,
    fused_kernels: bool,
) -> Tensor:
    """The mixers of all scans as a pure function: u [b, l, s, d] -> [b, l, s, d].

    `u` is in each scan's order; `seq_idx` [b, l] keeps packed samples apart.
    """
    b, length, s, _ = u.shape
    d_inner = w.norm.shape[1]
    causal_conv: Any = fused.causal_conv if fused_kernels else conv.causal_conv
    scan: Any = fused.ssd if fused_kernels else torch_ssd.ssd
    # The weights are split, not the results: joining gradients of activations costs far more.
    in_z, in_x, in_BC, in_dt = w.in_proj.split(
        [d_inner, d_inner, 2 * d_state, w.dt_bias.shape[1]], 1
    )
    z, dt = _project(u, in_z), _project(u, in_dt)

    # Scans become further channels, heads and groups of one kernel call.
    channels = [d_inner, 2 * d_state]
    taps, biases = w.conv1d_weight.split(channels, 1), w.conv1d_bias.split(channels, 1)
    mixed = [_project(u, weight).flatten(2) for weight in (in_x, in_BC)]
    x, BC = (
        causal_conv(t, taps[i].flatten(0, 1), biases[i].flatten(0, 1), seq_idx)
        for i, t in enumerate(mixed)
    )
    x = x.unflatten(2, (-1, headdim))
    B, C = BC.unflatten(2, (s, -1)).chunk(2, -1)
    # Step sizes and decay stay fp32 whatever the autocast.
    A = -w.A_log.float().exp().flatten()
    dt = F.softplus(dt.float() + w.dt_bias.float()).flatten(2)
    held = x * torch_ssd.zoh_scale(dt, A).unsqueeze(-1).to(x.dtype) if zoh else x
    y = scan(held, dt, A, B, C, chunk_size=chunk_size, seq_idx=seq_idx)
    y = y + x * w.D.flatten().unsqueeze(-1).to(x.dtype)
    y = _gated_norm(y.reshape(b, length, s, d_inner), z, w.norm)
    return _project(y, w.out_proj)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """[b, l, s, in] x [s, out, in] -> [b, l, s, out]."""
    if len(weight) == 1:
        return F.linear(x, weight.squeeze(0))
    return torch.einsum("blsi,soi->blso", x, weight)


def _gated_norm(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm(y * silu(z)) over the last axis, in fp32."""
    gated = (y * F.silu(z)).float()
    return (F.rms_norm(gated, gated.shape[-1:], eps=1e-5) * weight.float()).to(y.dtype)


class _Stacked(nn.Module):
    """Holds `weight`, and `bias` where there is one, under the names of `mamba_ssm.Mamba2`.

    All have a leading scan axis: a bias has two dimensions, so weight decay goes by name.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)


class Mamba2(nn.Module):
    """The parameters of `n_scans` mixers, for `mix`.

    Slice k of each loads into a stock `mamba_ssm.Mamba2` by name.
    """

    def __init__(self, config: ModelConfig, n_scans: int) -> None:
        super().__init__()
        d_inner = config.expand * config.d_model
        n_heads = d_inner // config.headdim
        channels = d_inner + 2 * config.d_state
        self.settings: dict[str, Any] = {
            "d_state": config.d_state,
            "headdim": config.headdim,
            "chunk_size": config.chunk_size,
            "zoh": config.discretization == "zoh",
            "fused_kernels": config.kernel == "fused",
        }

        def uniform(*shape: int, fan_in: int) -> Tensor:
            return torch.empty(n_scans, *shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)

        self.in_proj = _Stacked(
            uniform(d_inner + channels + n_heads, config.d_model, fan_in=config.d_model)
        )
        self.conv1d = _Stacked(
            uniform(channels, 1, config.d_conv, fan_in=config.d_conv),
            uniform(channels, fan_in=config.d_conv),
        )
        # A head remembers about 1 / (dt A) tokens and writes a token with weight dt, against a skip
        # of weight D = 1: the defaults are mamba_ssm's, for thousands of tokens.
        ends = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.empty(n_scans, n_heads).uniform_(*ends).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
        A = torch.empty(n_scans, n_heads).uniform_(config.a_min, config.a_max)
        self.A_log = nn.Parameter(A.log())
        self.D = nn.Parameter(torch.ones(n_scans, n_heads))
        self.norm = _Stacked(torch.ones(n_scans, d_inner))
        self.norm.weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = _Stacked(uniform(config.d_model, d_inner, fan_in=d_inner))

    @property
    def weights(self) -> Weights:
        """The parameters, as `mix` takes them."""
        return Weights(
            self.in_proj.weight,
            self.conv1d.weight,
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            self.out_proj.weight,
        )
