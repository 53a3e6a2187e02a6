"""The attention block of the decoder ablation: grouped-query attention and SwiGLU (MonoFormer).

It replaces a Mamba-2 block in the same trunk with the same embeddings, which already carry
positions: there are no rotary ones. Attention is bidirectional over the joint sequence.

Shapes: b batch, l length, d d_model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.mamba2 import Mamba2


def feed_forward_width(config: ModelConfig, n_scans: int) -> int:
    """Inner width of the MLP: `d_ff`, or as many parameters as a Mamba-2 block has.

    Raises:
        ValueError: attention alone is larger than the Mamba-2 block.
    """
    if config.d_ff:
        return config.d_ff
    with torch.device("meta"):
        total = sum(p.numel() for p in Mamba2(config, n_scans).parameters())
    d = config.d_model
    attention = 2 * d * d + 2 * d * (d // config.n_heads) * config.n_kv_heads
    width = round((total - attention) / (3 * d))
    if width < 1:
        raise ValueError(
            f"attention has {attention} parameters, the Mamba-2 block that it replaces {total}: "
            f"nothing is left for the MLP; set model.d_ff, or fewer model.n_kv_heads"
        )
    return width


class AttentionBlock(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config: ModelConfig, n_scans: int) -> None:
        super().__init__()
        d, d_ff = config.d_model, feed_forward_width(config, n_scans)
        self.headdim = d // config.n_heads
        kv = config.n_kv_heads * self.headdim
        self.norm = nn.Parameter(torch.ones(d))
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(d))
        self.gate_proj = nn.Linear(d, d_ff, bias=False)
        self.up_proj = nn.Linear(d, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d, bias=False)
        with torch.no_grad():  # branches start small, so that depth does not matter
            for last in (self.o_proj, self.down_proj):
                last.weight.mul_((2 * config.n_layer) ** -0.5)

    def forward(self, x: Tensor, scan: Any = None, seq_idx: Tensor | None = None) -> Tensor:
        """[b, l, d] -> [b, l, d]; `scan` is ignored: attention has no order.

        With `seq_idx` [r, w], x is [1, r w, d]: r rows end to end, in each of which a token attends
        only to tokens of the same number.
        """
        normed = F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5)
        rows = normed if seq_idx is None else normed.view(*seq_idx.shape, -1)
        x = x + self.o_proj(self._attend(rows, seq_idx)).view(x.shape)
        normed = F.rms_norm(x, x.shape[-1:], self.mlp_norm, eps=1e-5)
        gated = F.silu(self.gate_proj(normed)) * self.up_proj(normed)
        joined: Tensor = x + self.down_proj(gated)
        return joined

    def _attend(self, x: Tensor, seq_idx: Tensor | None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None
        if seq_idx is not None:
            mask = (seq_idx.unsqueeze(2) == seq_idx.unsqueeze(1)).unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
