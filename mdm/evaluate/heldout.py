"""What an evaluation compares with: encoded rows, real pictures, prompts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """The rows of one encoded split: `latents` f32 [n, N, C], `class_ids` i64 [n], -1 for none."""

    ids: tuple[str, ...]
    latents: Tensor
    texts: tuple[str, ...]
    class_ids: Tensor

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.latents), len(self.texts), len(self.class_ids)}
        if len(lengths) != 1:
            raise ValueError(f"columns of an encoded split differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> "Encoded":
        """The rows at the indices `rows` i64 [k]."""
        picked = rows.tolist()
        return Encoded(
            tuple(self.ids[i] for i in picked),
            self.latents[rows],
            tuple(self.texts[i] for i in picked),
            self.class_ids[rows],
        )


@dataclass(frozen=True)
class Pictures:
    """Real pictures: `pixels` f32 [n, 3, H, W] in [0, 1], `labels` i64 [n], -1 for none."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def halves(self) -> "tuple[Pictures, Pictures]":
        """Two disjoint halves with the same share of each class."""
        order = torch.argsort(self.labels, stable=True)
        picks = order[0::2].sort().values, order[1::2].sort().values
        a, b = (Pictures(self.pixels[p], self.labels[p]) for p in picks)
        return a, b


def balanced(class_ids: Tensor, n: int) -> Tensor:
    """Indices i64 [≤ n] of rows that go round the classes, in the order of the rows.

    Rows without a class are left out.
    """
    rank = torch.zeros_like(class_ids)
    for c in sorted(set(class_ids.tolist())):
        where = class_ids == c
        rank[where] = torch.arange(int(where.sum()))
    rows = torch.nonzero(class_ids >= 0).squeeze(1)
    key = rank[rows] * (int(class_ids.max()) + 1) + class_ids[rows]
    return rows[torch.argsort(key, stable=True)][:n]
