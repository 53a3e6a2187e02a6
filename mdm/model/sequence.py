"""The token layout `[time][class] [pad text pad] [pad image pad] ...` (Fig. 2 d-g).

Only this file knows the position of a token: the length of a sequence, the orders in which scans
read it, which slice of it is text or image, and how packed texts lie in their rows.

Shapes: b samples, i images a sample, n image tokens of all images, m text tokens, l whole sequence,
d d_model, s scans; k packed texts in r rows, t tokens kept of all samples together.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mdm.config import ModelConfig
from mdm.model.scan_order import Scan, image_scan, text_scan

HEAD = 2  # time and class tokens
PADS = 2  # before and after each segment
FRAME = HEAD + PADS  # places that a text takes beside its tokens

Patterns = tuple[tuple[int, int], ...]  # (image pattern, text pattern) of each scan of a block


class Order(NamedTuple):
    """The order in which each scan of a block reads the sequence, and its inverse."""

    order: Tensor  # i64 [l, s]
    inverse: Tensor  # i64 [l, s]
    position: Tensor | None = None  # i64 [l], of each token before others were left out


class Layout(NamedTuple):
    """The sequence of one sample. A `NamedTuple`, because DeepSpeed's ZeRO-3 hooks know those."""

    text: int  # text tokens, without their two pads
    images: int = 0
    grid: tuple[int, int] = (0, 0)  # rows and columns of image tokens of each image

    @classmethod
    def of(cls, model: ModelConfig, text: int, images: int) -> "Layout":
        """The layout of `text` text tokens and `images` images of the model's grid."""
        return cls(text, images, (model.image_height, model.image_width))

    @property
    def image(self) -> int:
        """Tokens of one image, without its two pads."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return FRAME + self.text + self.images * (self.image + PADS)

    def scan(self, image: int, text: int) -> Scan:
        """The order of the whole sequence, and its inverse, i64 [l] each.

        Image patterns 2 and 4 also reverse the order of the segments: information then flows from
        the image to the text, which a scan that keeps the text in front never allows. All images
        are read in the same pattern.

        Args:
            image: image pattern 1-4; without an image 2 and 4 put the head last.
            text: text pattern 1-2.
        """
        reverse = image in (2, 4)
        segments = [text_scan(self.text, text)[0]]
        if self.images:
            segments += [image_scan(*self.grid, image)[0]] * self.images
        head = torch.arange(HEAD)
        parts, start = [head.flip(0) if reverse else head], HEAD
        for inner in segments:
            end = start + 1 + len(inner)
            first, last = (end, start) if reverse else (start, end)
            parts.append(
                torch.cat([torch.tensor([first]), inner + start + 1, torch.tensor([last])])
            )
            start = end + 1
        order = torch.cat(parts[::-1] if reverse else parts)
        return order, order.argsort()

    def split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[b, l, d] -> the text [b, m, d], and each image [b, n / i, d]."""
        start = HEAD + 1
        text = x[:, start : start + self.text]
        starts = (start + self.text + PADS + i * (self.image + PADS) for i in range(self.images))
        return text, [x[:, s : s + self.image] for s in starts]

    def mask(self, keep_txt: Tensor, keep_img: Tensor | None) -> Tensor:
        """The tokens of the sequence to keep, bool [b, l], from those of [b, m] and [b, n].

        Head and pads are kept, except in a sample that keeps no other token.
        """
        images = () if keep_img is None else keep_img.chunk(self.images, 1)
        alive = torch.cat([keep_txt, *images], 1).any(1, keepdim=True)
        return join([alive] * HEAD, keep_txt, images, [alive] * 2 * PADS)


def join(
    head: Sequence[Tensor], text: Tensor, images: Iterable[Tensor], pads: Sequence[Tensor]
) -> Tensor:
    """The sequence [b, l, ...] of its parts, [b, tokens, ...] each.

    Args:
        head: time and class token.
        text: the text's tokens.
        images: each image's tokens.
        pads: before and after the text, before and after each image.
    """
    parts = [*head, pads[0], text, pads[1]]
    for image in images:
        parts += [pads[2], image, pads[3]]
    return torch.cat(parts, 1)


def pack_order(order: Tensor, keep: Tensor) -> Order:
    """How each scan of [l, s] reads the row of all t tokens that `keep` [b, l] leaves.

    Samples stay in turn, so that one `seq_idx` [1, t], the sample of each token, fits every scan.
    """
    place = keep.flatten().cumsum(0).view_as(keep) - 1  # of each kept token in the packed row
    packed = torch.stack([place[:, scan][keep[:, scan]] for scan in order.T], 1)
    return Order(packed, packed.argsort(0), keep.nonzero()[:, 1])


@lru_cache(maxsize=256)
def scan_order(layout: Layout, patterns: Patterns, device: torch.device) -> Order:
    """`Layout.scan` of each of a block's scans, on `device`."""
    orders, inverses = zip(*(layout.scan(*pattern) for pattern in patterns), strict=True)
    return Order(torch.stack(orders, 1).to(device), torch.stack(inverses, 1).to(device))


class TextRows(NamedTuple):
    """Rows `[time][class] [pad text pad] [time][class] [pad text pad] ...` of packed texts.

    A row of m text tokens has m + FRAME places, as many as one text that fills it. Flat places
    count through all rows; r (m + FRAME) means no place.
    """

    text_of: Tensor  # i64 [r, m], the text of each token, 0 for none
    position: Tensor  # i64 [r, m], of a token in its text
    place: Tensor  # i64 [r, m], flat, of a token
    frame: Tensor  # i64 [FRAME, k], flat, of time, class and the pads of each text
    seq_idx: Tensor  # i64 [r, m + FRAME], the text; k where there is none
    orders: dict[Patterns, Order]  # of r (m + FRAME) places


def text_rows(
    text_of: Tensor, count: int, patterns: Iterable[Patterns], device: torch.device | str = "cpu"
) -> TextRows:
    """The rows of `count` packed texts, computed where `text_of` lies and moved to `device`.

    Sizes depend on the data here: on a GPU every step would have to wait for it.

    Args:
        text_of: i64 [r, m], as in `mdm.data.batch.Batch`.
        count: k.
        patterns: of the scans of each block.
        device: of the result.
    """
    r, m = text_of.shape
    width, here = m + FRAME, text_of.device
    valid, text_index = text_of >= 0, text_of.clamp(min=0)
    text = torch.where(valid, text_of, count).flatten()
    row = torch.arange(r, device=here).repeat_interleave(m)
    length = row.new_zeros(count + 1).index_add(0, text, torch.ones_like(text))[:-1]
    row_of = row.new_zeros(count + 1).index_copy(0, text, row)[:-1]
    # Tokens and texts before each text, counted from the start of its row.
    first = text_index[:, 0][row_of]
    before = length.cumsum(0) - length
    start = before - before[first]
    turn = torch.arange(count, device=here) - first
    time = row_of * width + start + turn * FRAME
    position = torch.where(valid, torch.arange(m, device=here) - start[text_index], 0)
    place = torch.where(valid, time[text_index] + HEAD + 1 + position, r * width)
    frame = torch.stack([time, time + 1, time + HEAD, time + HEAD + 1 + length])
    seq_idx = row.new_full((r * width + 1,), count)
    seq_idx = seq_idx.index_copy(0, place.flatten(), text)
    seq_idx = seq_idx.index_copy(0, frame.flatten(), torch.arange(count, device=here).repeat(FRAME))
    seq_idx = seq_idx[:-1]
    # The places of each text if it were padded to m: scans read it as if it were the only one.
    layout, used = Layout(m), (seq_idx < count).nonzero().squeeze(1)
    keep = layout.mask(torch.arange(m, device=here) < length.unsqueeze(1), None)

    def order(scans: Patterns) -> Order:
        packed = pack_order(scan_order(layout, scans, here).order, keep).order
        flat = torch.arange(r * width, device=here).unsqueeze(1).repeat(1, len(scans))
        flat[used] = used[packed]
        return Order(*(t.to(device, non_blocking=True) for t in (flat, flat.argsort(0))))

    tensors = (text_index, position, place, frame, seq_idx.view(r, width))
    text_index, position, place, frame, seq_idx = (t.to(device, non_blocking=True) for t in tensors)
    orders = {scans: order(scans) for scans in set(patterns)}
    return TextRows(text_index, position, place, frame, seq_idx, orders)


class Texts:
    """The text of each token: spreads values of texts to their tokens, and averages them back.

    Without `text_of`, row i is text i. For packed texts it is i64 [r, m], counted row by row and -1
    after a row's last text, and means are over `average_over` texts: a rank's equal share of all,
    however many it holds.
    """

    def __init__(self, text_of: Tensor | None, count: int, average_over: int) -> None:
        self.count, self.average_over = count, average_over
        self.text_index = self.valid = None
        if text_of is not None:
            self.text_index, self.valid = text_of.clamp(min=0), text_of >= 0

    def spread(self, values: Tensor) -> Tensor:
        """[k] -> [k, 1], or [r, m] packed."""
        return values.unsqueeze(1) if self.text_index is None else values[self.text_index]

    def sums(self, values: Tensor) -> Tensor:
        """[r, m] -> [k], over each text's tokens."""
        if self.text_index is None or self.valid is None:
            return values.sum(1)
        zeros = values.new_zeros(self.count)
        return zeros.index_add(0, self.text_index.flatten(), (values * self.valid).flatten())

    def average(self, values: Tensor) -> Tensor:
        """[k] -> the mean over texts."""
        return values.mean() if self.text_index is None else values.sum() / self.average_over

    def mean(self, values: Tensor) -> Tensor:
        """[r, m] -> the mean over texts of their tokens' means."""
        if self.text_index is None:
            return values.mean()
        return self.average(self.sums(values) / self.sums(torch.ones_like(values)))
