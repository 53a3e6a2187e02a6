"""The Mamba-2 scan in torch: chunked matrix products, and the recurrence as their reference.

Shapes: b batch, l length, h heads, p channels per head, g groups, n state size.
"""

import math
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm.kernels.chunked import Scan, Stored


class Options(TypedDict, total=False):
    """Optional arguments of `ssd` and its twins; see there."""

    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    seq_idx: Tensor | None
    initial_states: Tensor | None
    return_final_states: bool


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan, Eqs. 10-12 with Euler's input matrix (Delta B).

        H_l = exp(dt_l A) H_{l-1} + dt_l B_l x_l^T,    y_l = C_l H_l + D x_l,    y_l *= silu(z_l)

    Args:
        x: [b, l, h, p]; any length.
        dt: [b, l, h] step sizes, before `dt_bias` and softplus, if those are applied.
        A: [h], negative.
        B: [b, l, g, n]; g divides h, head i uses group i // (h / g).
        C: [b, l, g, n].
        chunk_size: maximum number of tokens in one matrix product; affects only speed.
        D: [h] or [h, p] skip.
        z: [b, l, h, p] gate.
        dt_bias: [h].
        dt_softplus: apply softplus to dt + dt_bias.
        seq_idx: [b, l] integers; where it changes along l the state is reset.
        initial_states: [b, h, p, n], the state before the first token.
        return_final_states: also return the state [b, h, p, n] after the last token.

    Returns:
        y [b, l, h, p] in x's dtype, and if requested the final states in fp32. Sums are in fp32.

    Raises:
        ValueError: shapes or dtypes do not match; the message gives both values.
    """
    # Not collected in an `Options`, which would cut a compiled graph in two.
    check(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        initial_states=initial_states,
    )
    dtype, length = x.dtype, x.shape[1]
    dt = dt.float()
    if dt_bias is not None:
        dt = dt + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)
    q = chunk_length(length, chunk_size)
    pad = -length % q
    # Padding has dt = 0: it neither decays the state nor adds to it.
    xc, dtc, Bc, Cc = (_chunks(t.float(), q, pad) for t in (x, dt, B, C))
    seq = None if seq_idx is None else _chunk_seq(seq_idx, q, pad)
    initial = None if initial_states is None else initial_states.float()
    if initial is None and (xc.shape[1] > 1 or return_final_states):
        initial = xc.new_zeros(len(x), *x.shape[2:], B.shape[3])
    y, final = Scan.apply(  # type: ignore[no-untyped-call]
        xc, dtc, dtc * A.float(), Bc, Cc, seq, initial, _matmul_dtype(x.device)
    )
    y = y.flatten(1, 2)[:, :length]
    y = _skip_and_gate(y, x, D, z).to(dtype)
    return (y, final) if return_final_states else y


def _matmul_dtype(device: torch.device) -> torch.dtype:
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd` as the plain recurrence, token by token: its reference in tests. Same arguments."""
    check(x, dt, A, B, C, chunk_size, **options)
    seq_idx, initial = options.get("seq_idx"), options.get("initial_states")
    b, length, h, p = x.shape
    Bh, Ch = (t.repeat_interleave(h // B.shape[2], 2).to(x.dtype) for t in (B, C))
    if (bias := options.get("dt_bias")) is not None:
        dt = dt + bias
    if options.get("dt_softplus"):
        dt = F.softplus(dt)
    state = x.new_zeros(b, h, p, B.shape[3]) if initial is None else initial
    outputs = []
    for i in range(length):
        if seq_idx is not None and i > 0:
            same = (seq_idx[:, i] == seq_idx[:, i - 1]).to(x.dtype)
            state = state * same[:, None, None, None]
        decay = (dt[:, i] * A).exp()[..., None, None]
        update = (dt[:, i, :, None] * x[:, i]).unsqueeze(-1) * Bh[:, i].unsqueeze(-2)
        state = decay * state + update
        outputs.append((state * Ch[:, i].unsqueeze(-2)).sum(-1))
    y = _skip_and_gate(torch.stack(outputs, 1), x, options.get("D"), options.get("z"))
    return (y, state) if options.get("return_final_states") else y


def chunk_length(length: int, chunk_size: int) -> int:
    """Tokens per chunk, at most `chunk_size`, with all chunks of equal length.

    289 tokens in chunks of at most 256 become 2 x 145, not 2 x 256.
    """
    return math.ceil(length / math.ceil(length / chunk_size))


def zoh_scale(dt: Tensor, A: Tensor) -> Tensor:
    """Factor on x that turns Euler's Delta B into the zero-order hold of Eq. 13.

    (dt A)^-1 (exp(dt A) - 1), elementwise, with one scalar A per head. dt [..., h] is the positive
    step, A [h] is negative; the result is [..., h] in (0, 1].
    """
    dA = dt * A
    small = dA > -1e-4  # the series' next term is below fp32 there
    scale = torch.where(small, 1 + dA / 2, torch.expm1(dA) / torch.where(small, -1.0, dA))
    stored: Tensor = Stored.apply(scale)  # type: ignore[no-untyped-call]
    return stored


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D.unsqueeze(-1))
    return y if z is None else y * F.silu(z)


def _chunks(t: Tensor, q: int, pad: int) -> Tensor:
    if pad:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
    return t.reshape(t.shape[0], -1, q, *t.shape[2:])


def _chunk_seq(seq_idx: Tensor, q: int, pad: int) -> Tensor:
    if pad:  # padding extends the last sequence, so that its state is kept to the end
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1)
    return seq_idx.reshape(len(seq_idx), -1, q)


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    **options: Unpack[Options],
) -> None:
    """Raise ValueError, with both values, if shapes or dtypes do not match."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk has at least one token")
    if x.dim() != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be [batch, length, heads, headdim]"
        )
    b, length, h, p = x.shape
    if length == 0:
        raise ValueError("x has length 0; a scan needs at least one token")
    if B.dim() != 4 or not B.shape[2] or h % B.shape[2]:
        raise ValueError(f"B has shape {tuple(B.shape)}; its groups must divide the {h} heads of x")
    D = options.get("D")
    expected = {
        "x": (x, (b, length, h, p)),
        "dt": (dt, (b, length, h)),
        "A": (A, (h,)),
        "B": (B, (b, length, *B.shape[2:])),
        "C": (C, tuple(B.shape)),
        "D": (D, (h,) if D is None or D.dim() != 2 else (h, p)),
        "z": (options.get("z"), (b, length, h, p)),
        "dt_bias": (options.get("dt_bias"), (h,)),
        "initial_states": (options.get("initial_states"), (b, h, p, B.shape[3])),
    }
    for name, (tensor, shape) in expected.items():
        check_tensor(name, tensor, shape, x)
    check_seq_idx(options.get("seq_idx"), x)


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise ValueError unless a tensor given with x has this shape and is floating point."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; x {tuple(x.shape)} needs {shape}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; it must be floating point")


def check_seq_idx(seq_idx: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless seq_idx holds an integer for each token of x [b, l, ...]."""
    if seq_idx is None:
        return
    if seq_idx.shape != x.shape[:2]:
        raise ValueError(
            f"seq_idx has shape {tuple(seq_idx.shape)}; x {tuple(x.shape)} needs "
            f"{tuple(x.shape[:2])}"
        )
    if seq_idx.is_floating_point() or seq_idx.is_complex():
        raise ValueError(f"seq_idx is {seq_idx.dtype}; it must be an integer type")
