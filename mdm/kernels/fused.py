"""The CUDA kernels of mamba_ssm and causal-conv1d behind the signatures of `ssd.py` and `conv.py`.

A named kernel that is missing raises; nothing falls back to torch by itself.
"""

from typing import Any

from torch import Tensor

INSTALL = 'pip install -c infra/constraints.txt --no-build-isolation ".[gpu]"'


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
    """`mdm.kernels.ssd.ssd` on mamba_ssm's Triton kernel; same arguments and results."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        raise missing("mamba_ssm", error) from error
    return mamba_chunk_scan_combined(x, dt, A, B, C, **options)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """`mdm.kernels.conv.causal_conv` on causal-conv1d's kernel; same arguments and results."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError as error:
        raise missing("causal_conv1d", error) from error
    # The kernel reads [b, channels, l]; with seq_idx it wants that layout channel-last in memory.
    y: Tensor = causal_conv1d_fn(
        x.transpose(1, 2), weight.squeeze(1), bias, activation="silu", seq_idx=seq_idx
    )
    return y.transpose(1, 2)


def missing(package: str, error: ImportError) -> ImportError:
    """The error of a kernel that the config names and this machine lacks."""
    return ImportError(
        f"model.kernel is 'fused' but {package} does not load ({error}); "
        f"on a CUDA machine run `{INSTALL}`, or set --model.kernel torch"
    )
