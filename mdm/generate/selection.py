"""Selection (Sec. 3.2, Theorem 3): tokens whose score entropy has vanished are frozen and dropped.

At inference the true ratio is unknown; a token's last estimate takes its place. Where the
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
SIGNAL = 0.0  # log-SNR from which a token's noisy latent holds more signal than noise
CELL, GAP = 6, 4  # pixels a token's side, and between images of the map
_COLOURS, _NO_TOKEN = np.array([MOVING, SETTLED, ABSENT], np.uint8), -2


class Selected(NamedTuple):
    """The evaluation at which each token settled, -1 for never."""

    image: Tensor | None  # i64 [b, n]
    text: Tensor  # i64 [b, m]
    evaluations: int  # of the loop

    @classmethod
    def join(cls, parts: Sequence["Selected"], n: int) -> "Selected":
        """Those of several batches, the first `n` samples."""
        images = [part.image for part in parts if part.image is not None]
        text = torch.cat([part.text for part in parts])[:n]
        evaluations = max(part.evaluations for part in parts)
        return cls(torch.cat(images)[:n] if images else None, text, evaluations)

    def take(self, index: Tensor) -> "Selected":
        """The samples at `index` i64 [...]."""
        image = None if self.image is None else self.image[index]
        return Selected(image, self.text[index], self.evaluations)


def image_score_entropy(z_0: Tensor, last: Tensor, log_snr: float) -> Tensor:
    """Score entropy of image estimates [b, n, c] against the last ones, in nats a token, [b, n].

    In the continuum of candidates Eq. 7 is a Gaussian around z_0 of variance 1/SNR, and Eq. 4 the
    KL divergence of two of them: SNR/2 |z_0 - last|^2, which is how far the energy of Eq. 17
    (App.) at `last` lies below its maximum. Infinite below `SIGNAL`, where no two candidates can be
    told apart and every token would seem settled.
    """
    if log_snr < SIGNAL:
        return torch.full(z_0.shape[:2], torch.inf, device=z_0.device)
    snr = float(torch.tensor(log_snr).exp())
    return snr / 2 * (z_0.float() - last.float()).square().sum(-1)


def text_score_entropy(logits: Tensor, last: Tensor, log_snr: float) -> Tensor:
    """Score entropy over the vocabulary [b, m, v] against the last choice i64 [b, m], in nats.

    The target is one-hot as in training, so that Eq. 4 is the cross-entropy: it vanishes only for
    a token that is both certain and unchanged. Infinite below `SIGNAL`, where the network cannot
    have its certainty from the token itself.
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
        """Select the tokens that settle at evaluation i; returns which are new, bool [b, n]."""
        new = (score_entropy < self.threshold) & ~self.settled
        self.when[new] = i
        return new


def draw_map(selected: Selected, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The map of selected tokens (Fig. 2 h) as an image, uint8 [height, width, 3].

    A row for each sample, a column for each evaluation: the grid of image tokens, and under it the
    text's tokens in lines of the same width. Settled tokens are orange, the others blue.
    """
    width = grid[1]
    images = [] if selected.image is None else [selected.image.unflatten(1, grid)]
    lines = F.pad(selected.text, (0, -selected.text.shape[1] % width), value=_NO_TOKEN)
    rows = []
    for segment in (*images, lines.unflatten(1, (-1, width))):
        when = segment[:, :, None]  # [b, lines, 1, width]
        settled = (when >= 0) & (when <= torch.arange(selected.evaluations)[:, None])
        kind = torch.where(when == _NO_TOKEN, 2, settled.long())
        cells = _COLOURS[kind.numpy()]  # [b, lines, evaluations, width, 3]
        cells = cells.repeat(CELL, axis=1).repeat(CELL, axis=3)
        gaps = ((0, 0), (0, GAP), (0, 0), (0, GAP), (0, 0))
        cells = np.pad(cells, gaps, constant_values=255)
        rows.append(cells.reshape(*cells.shape[:2], -1, 3))
    return np.concatenate([*np.concatenate(rows, axis=1)], axis=0)
