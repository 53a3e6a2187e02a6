"""The CUDA kernels of mamba_ssm and causal-conv1d, with the signatures of `ssd.py` and `conv.py`.

A missing kernel raises ImportError; there is no silent fallback to torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor

from mdm.kernels import conv
from mdm.kernels.ssd import Options, check


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """`mdm.kernels.ssd.ssd` with mamba_ssm's Triton kernel; same arguments and results."""
    check(x, dt, A, B, C, chunk_size, **options)
    with _needs("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    options["seq_idx"] = _kernel_seq_idx(options.get("seq_idx"))
    result: Tensor | tuple[Tensor, Tensor]
    result = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **options)
    return result


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """`mdm.kernels.conv.causal_conv` with causal-conv1d's kernel; same arguments and results.

    The kernel supports 2 to 4 taps and multiples of 8 channels, and raises an error for others.
    """
    conv.check(x, weight, bias, seq_idx)
    with _needs("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn
    # The kernel reads [b, channels, l]. With seq_idx, channels must be contiguous in memory, as in
    # the transpose of a contiguous [b, l, channels]. Weight and bias share one dtype, which may
    # differ from x's.
    y: Tensor = causal_conv1d_fn(
        x.contiguous().transpose(1, 2),
        weight.squeeze(1),
        bias.to(weight.dtype),
        seq_idx=_kernel_seq_idx(seq_idx),
        activation="silu",
    )
    return y.transpose(1, 2)


def stock_mixer(**sizes: Any) -> torch.nn.Module:
    """`mamba_ssm.Mamba2`, a module that can load one slice of our stacked parameters."""
    with _needs("mamba_ssm"):
        from mamba_ssm.modules.mamba2 import Mamba2
    mixer: torch.nn.Module = Mamba2(**sizes)
    return mixer


@contextmanager
def _needs(package: str) -> Iterator[None]:
    """Import a configured kernel inside; an ImportError says what to do without it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"model.kernel is 'fused' but {package} does not load ({error}); on a CUDA machine run "
            '`pip install -c infra/constraints.txt --no-build-isolation ".[gpu]"`, or set '
            "--model.kernel torch"
        ) from error


def _kernel_seq_idx(seq_idx: Tensor | None) -> Tensor | None:
    """Sequence numbers in the form that the kernels require: contiguous int32, starting at 0.

    `initial_states` belong to the sequence with number 0, the first of each batch element.
    """
    if seq_idx is None:
        return None
    return (seq_idx - seq_idx[:, :1]).to(torch.int32).contiguous()
