"""Sequences without some of their tokens, packed end to end into one row.

Shapes: b batch, n image tokens, m text tokens, l whole sequence, t tokens that are left in all
samples together, s scans.
"""

import torch
from torch import Tensor

from mdm.model.embed import N_HEAD


def sequence_mask(keep_txt: Tensor, keep_img: Tensor | None, pictures: int = 1) -> Tensor:
    """Which tokens of `[head] [pad text pad] [pad image pad] ...` to keep, bool [b, l].

    Head and pads stay, except of a sample that keeps nothing at all.
    """
    alive = keep_txt.any(1) if keep_img is None else keep_txt.any(1) | keep_img.any(1)
    alive = alive.unsqueeze(1)
    parts = [alive.expand(-1, N_HEAD + 1), keep_txt, alive]
    for picture in () if keep_img is None else keep_img.chunk(pictures, 1):
        parts += [alive, picture, alive]
    return torch.cat(parts, 1)


def pack_order(order: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """How each scan of [l, s] reads the packed row, and the way back: (order, inverse), [t, s].

    Samples stay in turn, so that one `seq_idx` [1, t], the sample of each token, fits every scan.
    """
    place = keep.flatten().cumsum(0).view_as(keep) - 1  # of each kept token in the packed row
    packed = torch.stack([place[:, scan][keep[:, scan]] for scan in order.T], 1)
    return packed, packed.argsort(0)
