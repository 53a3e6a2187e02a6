"""The scan in chunks, as matrix products with a hand-written gradient.

State-space duality (Dao & Gu 2024, Sec. 6). In a chunk whose tokens i decay the state by exp(a_i),
with cs_i the sum of a up to token i and S the state before the chunk:

    y_i = sum_{j <= i} exp(cs_i - cs_j) (C_i B_j) w_j x_j  +  exp(cs_i) C_i S
    S'  = exp(cs_q) S  +  sum_j exp(cs_q - cs_j) w_j x_j B_j

Shapes: b batch, c chunks, q tokens per chunk, h heads, p channels per head, g groups, r heads per
group, n state size. Tokens stay in the order [b, c, q, h, p] wherever a product allows it.
"""

from typing import Any

import torch
from torch import Tensor


class Scan(torch.autograd.Function):
    """y [b, c, q, h, p] of all chunks and, given a first one, the state after the last, in fp32.

    With W_ij the product of a [q, q] weight and its gradient, that of cs_k is the sum of W_kj less
    that of W_ik: the diagonal, which is largest, cancels exactly. Beyond the chunk, each term of
    y_i and S' has a factor exp(cs_i) or exp(cs_q), each use of x_j a factor exp(-cs_j).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        seq: Tensor | None,
        initial: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """See `ssd`; `dtype` is that of the matrix products."""
        cs = log_decay.cumsum(2)
        Bg, Cg = (_batched(t).to(dtype) for t in (B, C))  # [b c g, q, n]
        written = _batched(x * weight.unsqueeze(-1)).to(dtype)  # [b c h, q, p]
        scores = _by_group(Bg @ Cg.mT, B)  # of token j for token i
        mixing = _flat(_decay(cs, seq, B) * scores.unsqueeze(3)).to(dtype)
        y = _unbatched(mixing.mT @ written, x)
        states, across, final = None, None, x.new_empty(0)
        if initial is not None:
            to_end, from_start, carry = _across(cs, seq)
            ended = _grouped(x * (weight * to_end).unsqueeze(-1), B).to(dtype)
            added = (ended.mT @ Bg).float().view(*carry.shape, *initial.shape[2:])
            before = []
            state = initial
            for chunk in range(x.shape[1]):
                before.append(state)
                state = carry[:, chunk, :, None, None] * state + added[:, chunk]
            states, final = torch.stack(before, 1), state
            between = Cg @ _grouped_state(states, B).to(dtype).mT
            across = _ungrouped(between, x) * from_start.unsqueeze(-1)
            y = y + across
        ctx.save_for_backward(x, weight, B, C, seq, cs, mixing, across, states, final)
        ctx.dtype = dtype
        return y, final

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `forward`'s tensors."""
        x, weight, B, C, seq, cs, mixing, across, states, final = ctx.saved_tensors
        dtype = ctx.dtype
        Bg, Cg = (_batched(t).to(dtype) for t in (B, C))
        grad = _batched(grad_y).to(dtype)
        grad_written = _unbatched(mixing @ grad, x)
        grad_mixing = _batched(x * weight.unsqueeze(-1)).to(dtype) @ grad.mT
        decay = _decay(cs, seq, B)
        grad_scores = _flat((decay * grad_mixing.view(decay.shape)).sum(3)).to(dtype)
        grad_B, grad_C = (grad_scores @ Cg).float(), (grad_scores.mT @ Bg).float()
        product = mixing.float() * grad_mixing.float()  # W of i and j, [.., j, i]
        grad_cs = (product.sum(1) - product.sum(2)).view(*cs.mT.shape).mT
        grad_end = grad_initial = None
        if states is not None:
            to_end, from_start, carry = _across(cs, seq)
            grad_between = _grouped(grad_y * from_start.unsqueeze(-1), B).to(dtype)
            grad_C = grad_C + (grad_between @ _grouped_state(states, B).to(dtype)).float()
            grad_before = (grad_between.mT @ Cg).float().view(states.shape)
            after: list[Tensor] = []
            grad_state = grad_final
            for chunk in reversed(range(x.shape[1])):
                after.insert(0, grad_state)
                grad_state = carry[:, chunk, :, None, None] * grad_state + grad_before[:, chunk]
            grad_initial, grad_after = grad_state, torch.stack(after, 1)
            reached = torch.cat([states[:, 1:], final.unsqueeze(1)], 1)
            grad_end = (grad_after * reached).sum((3, 4))
            grad_added = _grouped_state(grad_after, B).to(dtype)
            ended = _grouped(x * (weight * to_end).unsqueeze(-1), B).to(dtype)
            grad_B = grad_B + (ended @ grad_added).float()
            grad_ended = _ungrouped(Bg @ grad_added.mT, x)
            grad_ended = grad_ended * to_end.unsqueeze(-1)
            grad_written = grad_written + grad_ended
            grad_cs = grad_cs + (across * grad_y).sum(-1) - weight * (x * grad_ended).sum(-1)
        grad_weight = (x * grad_written).sum(-1)
        grad_decay = grad_cs.flip(2).cumsum(2).flip(2)
        if grad_end is not None:
            grad_decay = grad_decay + grad_end.unsqueeze(2)
        grad_x = grad_written * weight.unsqueeze(-1)
        grad_B, grad_C = (_unbatched(t, B) for t in (grad_B, grad_C))
        return grad_x, grad_weight, grad_decay, grad_B, grad_C, None, grad_initial, None


class Stored(torch.autograd.Function):
    """x itself, which a compiler then computes once.

    It would fuse a few exponentials of a head into the loops over all numbers of the head that
    they scale, and repeat them for each: most of a block's time outside matrix products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The same numbers."""
        return _stored(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The same gradient."""
        return grad


def _stored(x: Tensor) -> Tensor:
    return x.as_strided(x.shape, x.stride())  # needs memory to view


def _batched(x: Tensor) -> Tensor:
    """[b, c, q, h, p] -> [b c h, q, p], contiguous."""
    return x.transpose(2, 3).flatten(0, 2)


def _unbatched(x: Tensor, like: Tensor) -> Tensor:
    """[b c h, q, p] -> [b, c, q, h, p] in fp32."""
    b, c, q, h, p = like.shape
    return x.view(b, c, h, q, p).transpose(2, 3).float()


def _by_group(x: Tensor, B: Tensor) -> Tensor:
    """[b c g, ...] -> [b, c, g, ...]."""
    return x.view(*B.shape[:2], B.shape[3], *x.shape[1:])


def _flat(x: Tensor) -> Tensor:
    """[..., q, q] -> [all, q, q]."""
    return x.flatten(0, -3)


def _decay(cs: Tensor, seq: Tensor | None, B: Tensor) -> Tensor:
    """exp(cs_i - cs_j), zero where token i does not read token j; [b, c, g, r, j, i]."""
    q = cs.shape[2]
    allowed = torch.ones(q, q, dtype=torch.bool, device=cs.device).triu()
    if seq is not None:
        allowed = allowed & (seq.unsqueeze(-1) == seq.unsqueeze(-2)).unsqueeze(2)
    heads = _stored(cs.transpose(2, 3).contiguous())
    difference = heads.unsqueeze(-2) - heads.unsqueeze(-1)
    decay = difference.masked_fill(~allowed, float("-inf")).exp()
    by_group: Tensor = decay.unflatten(2, (B.shape[3], -1))
    return by_group


def _across(cs: Tensor, seq: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Decay of each token to its chunk's end and from its start [b, c, q, h]; across [b, c, h]."""
    total = cs[:, :, -1]
    to_end, from_start, carry = (total.unsqueeze(2) - cs).exp(), cs.exp(), total.exp()
    if seq is None:
        return _stored(to_end), _stored(from_start), _stored(carry)
    last = seq[..., -1]
    before = torch.cat([seq[:, :1, 0], last[:, :-1]], 1)  # the sequence of the incoming state
    to_end = to_end * (seq == last.unsqueeze(-1)).unsqueeze(-1)
    from_start = from_start * (seq == before.unsqueeze(-1)).unsqueeze(-1)
    carry = carry * (last == before).unsqueeze(-1)
    return _stored(to_end), _stored(from_start), _stored(carry)


def _grouped(x: Tensor, B: Tensor) -> Tensor:
    """[b, c, q, h, p] -> [b c g, q, r p]: the heads of a group side by side, for one product."""
    return _batched(x.unflatten(3, (B.shape[3], -1)).flatten(4))


def _ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """[b c g, q, r p] -> [b, c, q, h, p] in fp32."""
    return x.view(*like.shape[:2], -1, *x.shape[1:]).transpose(2, 3).reshape(like.shape).float()


def _grouped_state(states: Tensor, B: Tensor) -> Tensor:
    """[b, c, h, p, n] -> [b c g, r p, n]."""
    by_group: Tensor = states.unflatten(2, (B.shape[3], -1))
    return by_group.flatten(3, 4).flatten(0, 2)
