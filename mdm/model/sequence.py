"""The token layout `[time][class] [pad text pad] [pad image pad] ...` (Fig. 2 d-g).

Only this file knows the position of a token: the length of a sequence, the orders in which scans
read it, which slice of it is text or image, and how packed samples lie in their rows.

Shapes: b samples, i images a sample, n image tokens of all images, m text tokens, l whole sequence,
d d_model, s scans; k samples packed into r rows, t tokens kept of all samples together.
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
TEXT = HEAD + 1  # where the text begins

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
        text = x[:, TEXT : TEXT + self.text]
        starts = (TEXT + self.text + PADS + i * (self.image + PADS) for i in range(self.images))
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


class Rows(NamedTuple):
    """Samples in rows `[time][class] [pad text pad] [pad image pad] [time][class] ...`.

    A row has as many places as one sample whose text has m tokens. Flat places count through all
    rows; r l means no place.
    """

    layout: Layout  # of that sample
    sample_of: Tensor  # i64 [r, m], the sample of each text token, k for none
    position: Tensor  # i64 [r, m], of a text token in its sample's text
    place: Tensor  # i64 [r, m], flat, of a text token
    others: Tensor  # i64 [k, l - m], flat, of each sample's other tokens, in turn
    seq_idx: Tensor  # i64 [r, l], the sample; k where there is none
    orders: dict[Patterns, Order]  # of r l places

    def join(
        self, head: Sequence[Tensor], text: Tensor, images: Iterable[Tensor], pads: Sequence[Tensor]
    ) -> Tensor:
        """`join` of packed samples: [k, tokens, ...], for text [r, m, ...], -> [1, r l, ...]."""
        no_text = text.new_empty(len(self.others), 0, *text.shape[2:])
        others = join(head, no_text, images, pads)
        values = torch.cat([text.flatten(0, 1), others.flatten(0, 1)])
        places = torch.cat([self.place.flatten(), self.others.flatten()])
        x = values.new_zeros(self.seq_idx.numel() + 1, *values.shape[1:])
        return x.index_copy(0, places, values)[:-1].unsqueeze(0)

    def split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[1, r l, d] -> the text [r, m, d], and each image [k, n / i, d]."""
        flat = x.squeeze(0)
        _, images = self.layout._replace(text=0).split(flat[self.others])
        return flat[self.place.clamp(max=len(flat) - 1)], images

    def largest(self, text: Tensor) -> Tensor:
        """[r, m, d] -> [k, d], the maximum over each sample's text."""
        index = self.sample_of.flatten().unsqueeze(1).expand(-1, text.shape[2])
        least = text.new_full((len(self.others) + 1, text.shape[2]), -torch.inf)
        return least.scatter_reduce(0, index, text.flatten(0, 1), "amax")[:-1]


def pack_rows(
    text_of: Tensor,
    count: int,
    layout: Layout,
    patterns: Iterable[Patterns],
    device: torch.device | str = "cpu",
) -> Rows:
    """The rows of `count` packed samples, computed where `text_of` lies and moved to `device`.

    Sizes depend on the data here: on a GPU every step would have to wait for it.

    Args:
        text_of: i64 [r, m], as in `mdm.data.batch.Batch`.
        count: k.
        layout: of a sample whose text has m tokens.
        patterns: of the scans of each block.
        device: of the result.
    """
    r, m = text_of.shape
    here, places = text_of.device, r * layout.length
    sample_of = torch.where(text_of < 0, count, text_of)
    sample, token = sample_of.flatten(), torch.arange(r * m, device=here)
    length = token.new_zeros(count + 1).index_add(0, sample, torch.ones_like(token))[:-1]
    start = token.new_full((count + 1,), r * m).scatter_reduce(0, sample, token, "amin")
    row = start[:-1] // m
    position = torch.where(sample < count, token - start[sample], 0).view(r, m)
    # The places of each sample if its text were padded to m: scans read it as if it were alone.
    images = torch.ones(count, layout.images * layout.image, dtype=torch.bool, device=here)
    keep_text = torch.arange(m, device=here) < length.unsqueeze(1)
    keep = layout.mask(keep_text, images if layout.images else None)
    taken = keep.sum(1)
    row_taken = token.new_zeros(r).index_add(0, row, taken)
    before = taken.cumsum(0) - taken - (row_taken.cumsum(0) - row_taken)[row]
    time = row * layout.length + before
    place = torch.where(keep, time.unsqueeze(1) + keep.cumsum(1) - 1, places)  # [k, l]
    used, number = place[keep], torch.arange(count, device=here)
    seq_idx = token.new_full((places + 1,), count)
    seq_idx = seq_idx.index_copy(0, place.flatten(), number.repeat_interleave(layout.length))
    none = place.new_full((1, layout.length), places)
    of_text = torch.cat([place, none])[sample_of, TEXT + position]
    others = torch.cat([place[:, :TEXT], place[:, TEXT + m :]], 1)

    def order(scans: Patterns) -> Order:
        packed = pack_order(scan_order(layout, scans, here).order, keep).order
        flat = torch.arange(places, device=here).unsqueeze(1).repeat(1, len(scans))
        flat[used] = used[packed]
        return Order(*(t.to(device, non_blocking=True) for t in (flat, flat.argsort(0))))

    tensors = (sample_of, position, of_text, others, seq_idx[:-1].view(r, -1))
    sample_of, position, of_text, others, seq_idx = (
        t.to(device, non_blocking=True) for t in tensors
    )
    orders = {scans: order(scans) for scans in set(patterns)}
    return Rows(layout, sample_of, position, of_text, others, seq_idx, orders)


def spread(values: Tensor, sample_of: Tensor | None) -> Tensor:
    """[k, ...] -> [k, 1, ...]; or [r, m, ...] by `Rows.sample_of`, zeros where there is none."""
    if sample_of is None:
        return values.unsqueeze(1)
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])[sample_of]


class Samples:
    """The sample of each text token: spreads values of samples to them, and averages them back.

    Without `text_of`, row i is the text of sample i. For packed samples it is i64 [r, m], counted
    row by row and -1 after a row's last text, and means are over `average_over` samples: a rank's
    equal share of all, however many it holds.
    """

    def __init__(self, text_of: Tensor | None, count: int, average_over: int) -> None:
        self.count, self.average_over = count, average_over
        self.sample_of = None if text_of is None else torch.where(text_of < 0, count, text_of)

    def spread(self, values: Tensor) -> Tensor:
        """[k] -> [k, 1], or [r, m] packed."""
        return spread(values, self.sample_of)

    def sums(self, values: Tensor) -> Tensor:
        """[r, m] -> [k], over each sample's text tokens."""
        if self.sample_of is None:
            return values.sum(1)
        zeros = values.new_zeros(self.count + 1)
        return zeros.index_add(0, self.sample_of.flatten(), values.flatten())[:-1]

    def sums_before(self, values: Tensor) -> Tensor:
        """[r, m] -> [r, m], of counts: over the earlier text tokens of the same sample."""
        sums = values.cumsum(1) - values
        if self.sample_of is None:
            return sums
        most = sums.new_full((self.count + 1,), torch.iinfo(sums.dtype).max)
        first = most.scatter_reduce(0, self.sample_of.flatten(), sums.flatten(), "amin")
        return sums - first[self.sample_of]

    def average(self, values: Tensor) -> Tensor:
        """[k, ...] -> the mean over samples [...]."""
        return values.mean(0) if self.sample_of is None else values.sum(0) / self.average_over

    def mean(self, values: Tensor) -> Tensor:
        """[r, m] -> the mean over samples of their text tokens' means."""
        if self.sample_of is None:
            return values.mean()
        return self.average(self.sums(values) / self.sums(torch.ones_like(values)))
