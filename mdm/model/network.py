"""The diffusion decoder: embed, Mamba-2 blocks under alternating or parallel scans, two heads.

Shapes: b batch, n image tokens, m text tokens, l whole sequence, c latent width, d d_model.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model import scan
from mdm.model.embed import N_HEAD, Embed
from mdm.model.mamba2 import Mamba2


class Prediction(NamedTuple):
    """What the decoder says of each token."""

    image: Tensor | None  # [b, n, c], v = sqrt(abar) eps - sqrt(1 - abar) z_0
    text: Tensor  # [b, m, c], h: logits over the vocabulary are <h, mu_v> + b_v


class Block(nn.Module):
    """x + Mamba2(RMSNorm(x)), one mixer a scan."""

    def __init__(self, config: ModelConfig, n_scans: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.mixer = Mamba2(config, n_scans)
        with torch.no_grad():  # branches start small, so that depth does not matter
            self.mixer.out_proj.weight.mul_((2 * config.n_layer) ** -0.5)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """[b, l, s, d] -> the mixers' outputs [b, l, s, d], without the residual."""
        out: Tensor = self.mixer(F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5), seq_idx)
        return out


class Trunk(nn.Module):
    """The blocks, each reading the sequence in its scan's order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        image, text = scan.parse_scans(config.scans)
        self.separate = config.scan_mode == "separate"
        # (image pattern, text pattern) of every scan; the text turns with the picture.
        turns = [(p, text[(p - 1) % len(text)]) for p in image]
        self.scans = turns + [(p, p) for p in text] if self.separate else turns
        n_scans = len(self.scans) if self.separate else 1
        self.blocks = nn.ModuleList(Block(config, n_scans) for _ in range(config.n_layer))

    def forward(self, x: Tensor, m: int, grid: tuple[int, int] | None) -> Tensor:
        """[b, l, d] -> [b, l, d], for m text tokens and a grid of image tokens."""
        return self._parallel(x, m, grid) if self.separate else self._alternate(x, m, grid)

    def _alternate(self, x: Tensor, m: int, grid: tuple[int, int] | None) -> Tensor:
        """One mixer a block; block i reads in scan i. The stream stays in the scan's order."""
        orders, moves = _plan(tuple(self.scans), len(self.blocks), m, grid)
        for block, move in zip(self.blocks, moves, strict=True):
            x = x.index_select(1, move.to(x.device))
            x = x + block(x.unsqueeze(2)).squeeze(2)
        return x.index_select(1, orders[-1].argsort().to(x.device))

    def _parallel(self, x: Tensor, m: int, grid: tuple[int, int] | None) -> Tensor:
        """All mixers of a block at once, each in its own order; their mean joins the stream."""
        orders, _ = _plan(tuple(self.scans), len(self.scans), m, grid)
        order = torch.stack(orders, 1).to(x.device)  # [l, s]
        inverse = order.argsort(0).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        for block in self.blocks:
            mixed = block(x[:, order])  # [b, l, s, d]
            x = x + mixed.gather(1, inverse.expand(len(x), -1, -1, -1)).mean(2)
        return x


class Network(nn.Module):
    """Predicts noise of image latents and scores of text tokens at given noise levels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = (config.image_height, config.image_width)
        self.embed = Embed(config)
        self.trunk = Trunk(config)
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.image_out = nn.Linear(config.d_model, config.latent_dim)
        self.text_out = nn.Linear(config.d_model, config.latent_dim)
        nn.init.zeros_(self.image_out.weight)
        nn.init.zeros_(self.image_out.bias)

    def forward(
        self,
        z_txt: Tensor,
        level_txt: Tensor,
        prompt: Tensor,
        class_ids: Tensor,
        z_img: Tensor | None = None,
        level_img: Tensor | None = None,
        estimate_txt: Tensor | None = None,
    ) -> Prediction:
        """One denoising evaluation.

        Args:
            z_txt: [b, m, c] noisy text latents; clean ones where `prompt`.
            level_txt: [b] log-SNR of the text tokens outside the prompt.
            prompt: bool [b, m], text tokens that are clean conditions.
            class_ids: [b] labels, -1 for none.
            z_img: [b, n, c] noisy image latents, None for text alone.
            level_img: [b] log-SNR of the image tokens.
            estimate_txt: [b, m, c] the last estimate of the clean text, zeros without one.

        Returns:
            `Prediction`.
        """
        if estimate_txt is None:
            estimate_txt = torch.zeros_like(z_txt)
        x = self.embed(z_txt, estimate_txt, level_txt, prompt, class_ids, z_img, level_img)
        m = z_txt.shape[1]
        grid = None if z_img is None else self.grid
        x = self.trunk(x, m, grid)
        x = F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5)
        text_start = N_HEAD + 1
        text = self.text_out(x[:, text_start : text_start + m])
        if grid is None:
            return Prediction(None, text)
        image_start = text_start + m + 2
        return Prediction(self.image_out(x[:, image_start : image_start + grid[0] * grid[1]]), text)


@lru_cache(maxsize=64)
def _plan(
    scans: tuple[tuple[int, int], ...], depth: int, m: int, grid: tuple[int, int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Order of each of `depth` blocks, and the move from one block's order to the next one's."""
    orders = [scan.joint_scan(N_HEAD, m, grid, *scans[i % len(scans)])[0] for i in range(depth)]
    moves = [orders[0]]
    for before, after in pairwise(orders):
        moves.append(before.argsort()[after])
    return orders, moves
