"""Sequences end to end in one row: those without some of their tokens, and packed short texts.

Shapes: b batch, n image tokens, m text tokens, l whole sequence, t tokens that are left in all
samples together, s scans; k packed texts in r rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

N_HEAD = 2  # time and class tokens


def sequence_mask(keep_txt: Tensor, keep_img: Tensor | None, images: int = 1) -> Tensor:
    """Which tokens of `[head] [pad text pad] [pad image pad] ...` to keep, bool [b, l].

    Head and pads stay, except of a sample that keeps nothing at all.
    """
    alive = keep_txt.any(1) if keep_img is None else keep_txt.any(1) | keep_img.any(1)
    alive = alive.unsqueeze(1)
    parts = [alive.expand(-1, N_HEAD + 1), keep_txt, alive]
    for image in () if keep_img is None else keep_img.chunk(images, 1):
        parts += [alive, image, alive]
    return torch.cat(parts, 1)


def pack_order(order: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """How each scan of [l, s] reads the packed row, and the way back: (order, inverse), [t, s].

    Samples stay in turn, so that one `seq_idx` [1, t], the sample of each token, fits every scan.
    """
    place = keep.flatten().cumsum(0).view_as(keep) - 1  # of each kept token in the packed row
    packed = torch.stack([place[:, scan][keep[:, scan]] for scan in order.T], 1)
    return packed, packed.argsort(0)


class Texts:
    """Which text each text token belongs to: values of texts to their tokens, and means back.

    Without `text_of` row i is text i. Packed, it is i64 [r, m], counted row by row and -1 after a
    row's last text, and means are taken over `average_over` texts: a rank's share of all of them,
    however many it holds.
    """

    def __init__(self, text_of: Tensor | None, count: int, average_over: int) -> None:
        self.count, self.average_over = count, average_over
        self.own = self.valid = None
        if text_of is not None:
            self.own, self.valid = text_of.clamp(min=0), text_of >= 0

    def spread(self, values: Tensor) -> Tensor:
        """[k] -> [k, 1], or [r, m] packed."""
        return values.unsqueeze(1) if self.own is None else values[self.own]

    def sums(self, values: Tensor) -> Tensor:
        """[r, m] -> [k], over each text's tokens."""
        if self.own is None or self.valid is None:
            return values.sum(1)
        zeros = values.new_zeros(self.count)
        return zeros.index_add(0, self.own.flatten(), (values * self.valid).flatten())

    def average(self, values: Tensor) -> Tensor:
        """[k] -> the mean over texts."""
        return values.mean() if self.own is None else values.sum() / self.average_over

    def mean(self, values: Tensor) -> Tensor:
        """[r, m] -> the mean over texts of their tokens' means."""
        if self.own is None:
            return values.mean()
        return self.average(self.sums(values) / self.sums(torch.ones_like(values)))


class TextRows(NamedTuple):
    """Rows `[time][class] [pad text pad] [time][class] [pad text pad] ...` of packed texts.

    A row of m text tokens has m + 4 places, as many as one text that fills it. Flat places count
    through all rows; r (m + 4) stands for none.
    """

    position: Tensor  # i64 [r, m], of a token in its text
    place: Tensor  # i64 [r, m], flat, of a token
    frame: Tensor  # i64 [4, k], flat, of time, class and the pads of each text
    seq_idx: Tensor  # i64 [r, m + 4], the text; k where there is none
    keep: Tensor  # bool [k, m + 4], the places that a text of its own has if it were padded to m

    def order(self, alone: Tensor) -> tuple[Tensor, Tensor]:
        """How the rows are read if `alone` [m + 4, s] is how a text of m tokens is, and back."""
        packed, _ = pack_order(alone, self.keep)
        used = (self.seq_idx.flatten() < len(self.keep)).nonzero().squeeze(1)
        order = torch.arange(self.seq_idx.numel(), device=alone.device).unsqueeze(1)
        order = order.repeat(1, alone.shape[1])
        order[used] = used[packed]
        return order, order.argsort(0)


def text_rows(text_of: Tensor, count: int) -> TextRows:
    """The rows of `count` packed texts, `text_of` i64 [r, m] as in `Texts`."""
    r, m = text_of.shape
    width, device = m + N_HEAD + 2, text_of.device
    valid = text_of >= 0
    text = torch.where(valid, text_of, count).flatten()
    row = torch.arange(r, device=device).repeat_interleave(m)
    length = row.new_zeros(count + 1).index_add(0, text, torch.ones_like(text))[:-1]
    row_of = row.new_zeros(count + 1).index_copy(0, text, row)[:-1]
    # Tokens and texts before each text, and in its own row alone.
    first = text_of[:, 0].clamp(min=0)[row_of]
    before = length.cumsum(0) - length
    start = before - before[first]
    turn = torch.arange(count, device=device) - first
    time = row_of * width + start + turn * (N_HEAD + 2)
    own = text_of.clamp(min=0)
    position = torch.where(valid, torch.arange(m, device=device) - start[own], 0)
    place = torch.where(valid, time[own] + N_HEAD + 1 + position, r * width)
    pad = time + N_HEAD + 1 + length
    frame = torch.stack([time, time + 1, time + N_HEAD, pad])
    seq_idx = row.new_full((r * width + 1,), count)
    seq_idx = seq_idx.index_copy(0, place.flatten(), text)
    seq_idx = seq_idx.index_copy(0, frame.flatten(), torch.arange(count, device=device).repeat(4))
    keep_txt = torch.arange(m, device=device) < length.unsqueeze(1)
    return TextRows(
        position, place, frame, seq_idx[:-1].view(r, width), sequence_mask(keep_txt, None)
    )
