"""The scan on a CPU, forward and backward: ours, the listing of the paper, the recurrence."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from benchmarks.shapes import CHUNK, SHAPES, Shape, scan_products
from benchmarks.timing import THREADS, Result, matmul_floor, milliseconds, worst
from mdm.kernels.ssd import ssd, ssd_reference


def segsum(x: Tensor) -> Tensor:
    """[..., t] -> [..., t, t]: sums of x over (j, i], -inf above the diagonal."""
    t = x.shape[-1]
    mask = torch.ones(t, t, dtype=torch.bool)
    repeated = x.unsqueeze(-1).expand(*x.shape, t).masked_fill(~mask.tril(-1), 0)
    return repeated.cumsum(-2).masked_fill(~mask.tril(), float("-inf"))


def ssd_minimal(x: Tensor, dA: Tensor, B: Tensor, C: Tensor, block: int) -> Tensor:
    """Listing 1 of the Mamba-2 paper (Dao & Gu 2024).

    x [b, l, h, p] is already scaled by dt, dA [b, l, h], B and C [b, l, h, n]; block divides l.
    """
    x, dA, B, C = (t.unflatten(1, (-1, block)) for t in (x, dA, B, C))
    dA = dA.permute(0, 3, 1, 2)
    cumulative = dA.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segsum(dA).exp(), x)
    decay = (cumulative[..., -1:] - cumulative).exp()
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, decay, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    carry = segsum(F.pad(cumulative[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", carry, states)[:, :-1]
    between = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, cumulative.exp())
    return (inside + between).flatten(1, 2)


def case(shape: Shape) -> Result:
    """All contestants at one shape, in fp32."""
    torch.manual_seed(0)
    b, length, heads = shape.batch, shape.length, shape.heads
    p, n = shape.config.headdim, shape.config.d_state
    x = torch.randn(b, length, heads, p, requires_grad=True)
    dt = (0.1 * torch.rand(b, length, heads)).requires_grad_()
    A = (-16 * torch.rand(heads)).requires_grad_()
    B, C = (torch.randn(b, length, 1, n, requires_grad=True) for _ in range(2))
    grad = torch.randn(b, length, heads, p)
    inputs = (x, dt, A, B, C)

    def minimal(block: int) -> Callable[..., Tensor]:
        pad = -length % block

        def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            B, C = (t.expand(-1, -1, heads, -1) for t in (B, C))
            parts = [x * dt.unsqueeze(-1), dt * A, B, C]
            x, dA, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in parts)
            return ssd_minimal(x, dA, B, C, block)[:, :length]

        return scan

    def timed(scan: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(scan(*inputs), inputs, grad)

    compiled = torch.compile(ssd, dynamic=False)
    times = milliseconds(
        {
            "ours": timed(lambda *t: compiled(*t, chunk_size=CHUNK)),
            "ours, not compiled": timed(lambda *t: ssd(*t, chunk_size=CHUNK)),
            "ssd_minimal": timed(minimal(shape.chunk)),
            "transformers": timed(lambda *t: mamba2_chunk_scan(*t, chunk_size=shape.chunk)),
            "floor": matmul_floor(scan_products(shape), torch.float32),
        }
    )
    if shape == SHAPES[0]:  # at the other shapes it takes seconds
        recurrence = timed(lambda *t: ssd_reference(*t, chunk_size=CHUNK))
        times |= milliseconds({"recurrence": recurrence}, seconds=0)
    ours, floor, eager = (times.pop(k) for k in ("ours", "floor", "ours, not compiled"))
    setting = f"{shape}, fp32, {THREADS} thread"
    return Result("ssd_cpu", "ms", ours, times, setting, floor, more={"not_compiled": eager})


def run() -> Result:
    """Forward and backward of the scan at every shape."""
    return worst("ssd_cpu", (case(shape) for shape in SHAPES))
