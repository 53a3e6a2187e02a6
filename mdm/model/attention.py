"""The attention block of the decoder ablation: grouped-query attention and SwiGLU (MonoFormer).

It replaces a Mamba-2 block in the same trunk with the same embeddings. Attention is bidirectional
over the joint sequence, with rotary positions (Su et al. 2021) along it.

Shapes: b batch, l length, d d_model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.adaln import MODULATIONS, modulated
from mdm.model.mamba2 import Mamba2
from mdm.model.sequence import Order


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


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding of x [b, heads, l, p] at positions [l], computed in fp32.

    Pair i of the p numbers turns by position / 10000^(2i / p): the product of two rotated vectors
    depends on the difference of their positions. A last number without a partner stays.
    """
    pairs = x.shape[-1] // 2
    frequency = 10_000 ** (-torch.arange(pairs, device=x.device) / pairs)
    angle = position.unsqueeze(-1) * frequency
    one, other, rest = x.float().split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, one * sin + other * cos, rest], -1).to(x.dtype)


class AttentionBlock(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config: ModelConfig, n_scans: int) -> None:
        super().__init__()
        d, d_ff = config.d_model, feed_forward_width(config, n_scans)
        self.headdim = d // config.n_heads
        kv = config.n_kv_heads * self.headdim
        self.modulation: nn.Parameter | None = None
        if config.adaln:
            self.modulation = nn.Parameter(torch.zeros(2, MODULATIONS * d))  # attention, MLP
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

    def forward(
        self,
        x: Tensor,
        scan: Order | None = None,
        seq_idx: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """[b, l, d] -> [b, l, d]; of `scan` only the positions are used.

        With `seq_idx` [r, w], x is [1, r w, d]: r rows end to end, in each of which a token attends
        only to tokens of the same number. `modulation` is that of `mdm.model.decoder.residual`.
        """
        of_attention = of_mlp = modulation
        if self.modulation is not None and modulation is not None:
            of_attention, of_mlp = (modulation + own for own in self.modulation)
        normed, gate = modulated(F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5), of_attention)
        rows = normed if seq_idx is None else normed.view(*seq_idx.shape, -1)
        # Only differences of positions count, and rows of packed texts keep those inside a text.
        position = torch.arange(rows.shape[1], device=x.device)
        if scan is not None and scan.position is not None:
            position = scan.position
        x = x + gate * self.o_proj(self._attend(rows, position, seq_idx)).view(x.shape)
        normed, gate = modulated(F.rms_norm(x, x.shape[-1:], self.mlp_norm, eps=1e-5), of_mlp)
        gated = F.silu(self.gate_proj(normed)) * self.up_proj(normed)
        joined: Tensor = x + gate * self.down_proj(gated)
        return joined

    def _attend(self, x: Tensor, position: Tensor, seq_idx: Tensor | None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, position), rotated(k, position)
        mask = None
        if seq_idx is not None:
            mask = (seq_idx.unsqueeze(2) == seq_idx.unsqueeze(1)).unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
