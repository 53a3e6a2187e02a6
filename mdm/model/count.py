"""Multiply-accumulates of the decoder, counted from its sizes.

Published "GFLOPs" of such networks count weights times tokens, and a multiply-accumulate as one
operation: that is `products`. The exchange between tokens is `mixing`.
"""

from typing import NamedTuple

from mdm.config import ModelConfig
from mdm.kernels.ssd import chunk_length
from mdm.model.attention import feed_forward_width
from mdm.model.decoder import block_scans


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass of the trunk over one sequence."""

    products: int  # weights x tokens: projections, causal convolution, long skips, MLP
    mixing: int  # between tokens: the chunked scan's products of matrices, or attention's


def trunk_macs(config: ModelConfig, length: int) -> Macs:
    """Multiply-accumulates of all blocks over `length` tokens; thrice in a training step."""
    count = _attention_block if config.decoder == "transformer" else _mamba_block
    blocks = [count(config, len(scans), length) for scans in block_scans(config)]
    skips = config.n_layer // 2 if config.long_skip else 0
    products = sum(b.products for b in blocks) + skips * 2 * config.d_model**2 * length
    return Macs(products, sum(b.mixing for b in blocks))


def _mamba_block(config: ModelConfig, n_scans: int, length: int) -> Macs:
    d, n = config.d_model, config.d_state
    inner = config.expand * d
    in_proj = d * (2 * inner + 2 * n + inner // config.headdim)
    weights = in_proj + (inner + 2 * n) * config.d_conv + inner * d
    q = chunk_length(length, config.chunk_size)
    chunks = -(-length // q)
    within = q * q * (n + inner)  # scores C B^T of the one group, then scores times x, all heads
    between = 2 * q * inner * n if chunks > 1 else 0  # into the chunk's state, and out of it
    return Macs(n_scans * weights * length, n_scans * chunks * (within + between))


def _attention_block(config: ModelConfig, n_scans: int, length: int) -> Macs:
    d, kv = config.d_model, config.d_model // config.n_heads * config.n_kv_heads
    weights = 2 * d * d + 2 * d * kv + 3 * d * feed_forward_width(config, n_scans)
    return Macs(weights * length, 2 * length**2 * d)
