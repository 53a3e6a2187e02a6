"""Selection (Sec. 3.2, Theorem 3): tokens whose score entropy has vanished are frozen and dropped.

At inference the true ratio is unknown; a token's own last estimate stands in for it. Where the
score entropy between the two is about 0 nats, another evaluation would not move the token.

Shapes: b batch, n image tokens, m text tokens, c latent width, v vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MOVING, SETTLED, ABSENT = (44, 62, 80), (230, 126, 34), (255, 255, 255)  # colours of the map
SIGNAL = 0.0  # log-SNR from which a token's own noisy latent says more than its noise
CELL, GAP = 6, 4  # pixels a token's side, and between images of the map


class Selected(NamedTuple):
    """When each token settled: the number of the evaluation, -1 for never."""

    image: Tensor | None  # i64 [b, n]
    text: Tensor  # i64 [b, m]
    evaluations: int  # of the loop

    def first(self, n: int) -> "Selected":
        """Those of the first `n` samples."""
        image = None if self.image is None else self.image[:n]
        return Selected(image, self.text[:n], self.evaluations)

    @classmethod
    def join(cls, parts: "Sequence[Selected]") -> "Selected":
        """Those of several batches as one."""
        images = [part.image for part in parts if part.image is not None]
        return cls(
            torch.cat(images) if images else None,
            torch.cat([part.text for part in parts]),
            max(part.evaluations for part in parts),
        )


def image_score_entropy(z_0: Tensor, last: Tensor, log_snr: float) -> Tensor:
    """Score entropy of image estimates [b, n, c] against the last ones, in nats a token, [b, n].

    In the continuum of candidates Eq. 7 is a Gaussian around z_0 of variance 1/SNR, and Eq. 4 the
    KL divergence of two of them: SNR/2 |z_0 - last|^2, which is how far the energy of Eq. 17 at
    `last` lies below its maximum. Infinite below `SIGNAL`: no two candidates are told apart
    there, and every token would seem settled.
    """
    if log_snr < SIGNAL:
        return torch.full(z_0.shape[:2], torch.inf, device=z_0.device)
    snr = float(torch.tensor(log_snr).exp())
    return snr / 2 * (z_0.float() - last.float()).square().sum(-1)


def text_score_entropy(logits: Tensor, last: Tensor, log_snr: float) -> Tensor:
    """Score entropy over the vocabulary [b, m, v] against the last choice i64 [b, m], in nats.

    The target is one-hot as in training, so that Eq. 4 is the cross-entropy: it vanishes only for
    a token that is both sure and unchanged. Infinite below `SIGNAL`: what the network is sure of
    there it has from elsewhere than the token.
    """
    if log_snr < SIGNAL:
        return torch.full(last.shape, torch.inf, device=last.device)
    return F.cross_entropy(logits.float().transpose(1, 2), last, reduction="none")


class Selection:
    """The settled tokens of one modality, [b, n]."""

    def __init__(self, threshold: float, b: int, n: int) -> None:
        self.threshold = threshold  # nats a token; 0 selects nothing
        self.when = torch.full((b, n), -1)

    @property
    def settled(self) -> Tensor:
        """Bool [b, n]."""
        return self.when >= 0

    def update(self, i: int, score_entropy: Tensor) -> Tensor:
        """Select what evaluation i shows to be settled; returns which tokens are new, [b, n]."""
        new = (score_entropy < self.threshold) & ~self.settled
        self.when[new] = i
        return new


def draw_map(selected: Selected, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The map of selected tokens (Fig. 2 h) as an image, uint8 [height, width, 3].

    A row a sample, a column an evaluation: the grid of image tokens, and under it the text's tokens
    in lines of the same width. Settled tokens are orange, the others blue.
    """
    columns = [_cells(selected, grid, i) for i in range(selected.evaluations)]
    tokens = np.concatenate(columns, axis=2)  # [b, rows, columns, 3]
    return np.concatenate(list(tokens), axis=0)


def _cells(selected: Selected, grid: tuple[int, int], i: int) -> NDArray[np.uint8]:
    """All samples at evaluation i, [b, height, width, 3], with a gap below and at the right."""
    parts = []
    if selected.image is not None:
        parts.append(_colour(selected.image, i).reshape(-1, *grid, 3))
    text = _colour(selected.text, i)
    b, m, _ = text.shape
    padded = np.full((b, -(-m // grid[1]) * grid[1], 3), ABSENT, np.uint8)
    padded[:, :m] = text
    parts.append(padded.reshape(b, -1, grid[1], 3))
    blocks = [part.repeat(CELL, axis=1).repeat(CELL, axis=2) for part in parts]
    spaced = [np.pad(x, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for x in blocks]
    return np.concatenate(spaced, axis=1)


def _colour(when: Tensor, i: int) -> NDArray[np.uint8]:
    settled = ((when >= 0) & (when <= i)).numpy()[..., None]
    return np.where(settled, np.array(SETTLED, np.uint8), np.array(MOVING, np.uint8))
