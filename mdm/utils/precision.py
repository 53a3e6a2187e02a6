"""The precision of matrix products: bf16 where the hardware computes in it, fp32 elsewhere.

Parameters, optimizer state and what the model marks as fp32 stay fp32 either way; autocast only
chooses the type of matrix products. A CPU without bf16 units emulates them: up to 70 times slower
than fp32 with AVX2 alone, twice as slow with AVX-512.
"""

import time
from functools import cache

import torch

from mdm.config import PRECISIONS

AUTO, BF16, FP32 = PRECISIONS

_SIDE = 384  # of the timed matrices: a product takes milliseconds, and exceeds the caches
_TRIES = 7


@cache
def is_bf16_fast(device_type: str = "cpu") -> bool:
    """Whether a device of this type computes in bf16 rather than emulating it.

    CUDA does. For a CPU, oneDNN tells whether it supports bf16 (`ONEDNN_MAX_CPU_ISA` hides units
    from it); if it does, the same product is timed in both types, which takes some 30 ms.
    """
    if device_type != "cpu":
        return True
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    fp32 = torch.ones(_SIDE, _SIDE)
    bf16 = fp32.bfloat16()
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    # One thread, and its processor time rather than wall time: the cores may be busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_TRIES):
            for x in (fp32, bf16):
                began = time.thread_time()
                torch.mm(x, x)
                best[x.dtype] = min(best[x.dtype], time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] < best[torch.float32]


def resolve(precision: str, device_type: str = "cpu") -> str:
    """`bf16` or `fp32`: `precision` itself, or for `auto` the faster one on this type of device.

    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision != AUTO:
        return precision
    return BF16 if is_bf16_fast(device_type) else FP32


def describe(precision: str, device_type: str = "cpu") -> str:
    """A line for logs: a resolved precision, and how fast this device computes in it."""
    cpu = f"this CPU ({torch.backends.cpu.get_cpu_capability()})"
    kind = cpu if device_type == "cpu" else device_type.upper()
    fast = is_bf16_fast(device_type)
    if precision == BF16:
        return f"bf16, which {kind} " + ("computes in" if fast else "only emulates: slow here")
    return f"fp32: {kind} " + ("is faster in bf16" if fast else "has no bf16 units")


def fp32(device: torch.device) -> torch.autocast:
    """A context in which products of fp32 tensors are computed in fp32, whatever the autocast."""
    kind = "cpu" if device.type == "meta" else device.type
    return torch.autocast(kind, enabled=False)


def autocast(precision: str, device_type: str = "cpu") -> torch.autocast:
    """A context in which matrix products are computed in a resolved `precision`.

    Cast weights are not cached: under ZeRO-3 the copy would outlive the gathered weight, use the
    memory that partitioning saves, and receive its gradient after the weight was freed.
    """
    enabled = precision == BF16
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled, cache_enabled=False)
