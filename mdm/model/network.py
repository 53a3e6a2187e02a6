"""The diffusion decoder: embed, Mamba-2 blocks under alternating or parallel scans, two heads.

Shapes: b batch, n image tokens, m text tokens, l whole sequence, c latent width, d d_model.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model import scan
from mdm.model.embed import N_HEAD, Embed
from mdm.model.mamba2 import Mamba2, Weights, mix
from mdm.model.packing import pack_order, sequence_mask


class Prediction(NamedTuple):
    """What the decoder says of each token."""

    image: Tensor | None  # [b, n, c], v = sqrt(abar) eps - sqrt(1 - abar) z_0
    text: Tensor  # [b, m, c], h: logits over the vocabulary are <h, mu_v> + b_v


class Order(NamedTuple):
    """In which order each of a block's scans reads the sequence, and the way back."""

    order: Tensor  # i64 [l, s]
    inverse: Tensor  # i64 [l, s]


class _Scan(torch.autograd.Function):
    """x [b, l, d] -> x in the order of every scan [b, l, s, d]; its gradient only gathers too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[:, order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _unscan(grad, inverse), None, None


class _Unscan(torch.autograd.Function):
    """y [b, l, s, d] of every scan -> their sum in the sequence's own order [b, l, d]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _unscan(y, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, _ = ctx.saved_tensors
        return grad[:, order], None, None


def _unscan(y: Tensor, inverse: Tensor) -> Tensor:
    scans = torch.arange(inverse.shape[1], device=y.device)
    return y[:, inverse, scans].sum(2)


def residual(
    x: Tensor, norm: Tensor, weights: Weights, scan: Order, seq_idx: Tensor | None, **settings: Any
) -> Tensor:
    """Sum of x [b, l, d] and the mean over its scans of Mamba2(RMSNorm(x)), as a pure function."""
    normed = F.rms_norm(x, x.shape[-1:], norm, eps=1e-5)
    u: Tensor = _Scan.apply(normed, *scan)  # type: ignore[no-untyped-call]
    total: Tensor = _Unscan.apply(mix(u, weights, seq_idx, **settings), *scan)  # type: ignore[no-untyped-call]
    return x + total / u.shape[2]


@lru_cache(maxsize=1)
def _compiled_residual() -> Callable[..., Tensor]:
    """`residual` compiled once for all blocks: they differ in weights, not in shapes."""
    return torch.compile(residual, dynamic=False)


class Block(nn.Module):
    """x + the mean over its scans of Mamba2(RMSNorm(x)), one mixer a scan in one batched call."""

    def __init__(self, config: ModelConfig, n_scans: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.mixer = Mamba2(config, n_scans)
        self.compiled = config.kernel == "compiled"
        with torch.no_grad():  # branches start small, so that depth does not matter
            self.mixer.out_proj.weight.mul_((2 * config.n_layer) ** -0.5)

    def forward(self, x: Tensor, scan: Order, seq_idx: Tensor | None = None) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        # Training has one shape; the many shapes of generation are not worth compiling.
        run = _compiled_residual() if self.compiled and self.training else residual
        return run(x, self.norm, self.mixer.weights, scan, seq_idx, **self.mixer.settings)


class Trunk(nn.Module):
    """The blocks; with `alternate` block i reads in scan i, with `separate` each in all scans."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        image, text = scan.parse_scans(config.scans)
        # (image pattern, text pattern) of every scan; the text turns with the picture.
        turns = [(p, text[(p - 1) % len(text)]) for p in image]
        if config.scan_mode == "separate":
            self.scans = [(*turns, *((p, p) for p in text))] * config.n_layer
        else:
            self.scans = [(turns[i % len(turns)],) for i in range(config.n_layer)]
        self.blocks = nn.ModuleList(Block(config, len(scans)) for scans in self.scans)

    def forward(
        self, x: Tensor, m: int, grid: tuple[int, int] | None, keep: Tensor | None = None
    ) -> Tensor:
        """[b, l, d] -> [b, l, d], for m text tokens and a grid of image tokens.

        Tokens outside `keep` bool [b, l] come back as they went in, and no other token hears of
        them: what is left of all samples runs as one packed row.
        """
        if keep is not None:
            return self._packed(x, m, grid, keep)
        for block, scans in zip(self.blocks, self.scans, strict=True):
            x = block(x, _order(scans, m, grid, x.device))
        return x

    def _packed(self, x: Tensor, m: int, grid: tuple[int, int] | None, keep: Tensor) -> Tensor:
        sample = keep.nonzero()[:, 0].unsqueeze(0)
        orders = {
            scans: Order(*pack_order(_order(scans, m, grid, x.device).order, keep))
            for scans in set(self.scans)
        }
        row = x[keep].unsqueeze(0)
        for block, scans in zip(self.blocks, self.scans, strict=True):
            row = block(row, orders[scans], sample)
        x = x.to(row.dtype, copy=True)
        x[keep] = row[0]
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
        keep_txt: Tensor | None = None,
        keep_img: Tensor | None = None,
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
            keep_txt: bool [b, m], text tokens that the blocks read; all of them without it.
            keep_img: bool [b, n], the same of the image; given where `keep_txt` is.

        Returns:
            `Prediction`.
        """
        if estimate_txt is None:
            estimate_txt = torch.zeros_like(z_txt)
        x = self.embed(z_txt, estimate_txt, level_txt, prompt, class_ids, z_img, level_img)
        m = z_txt.shape[1]
        grid = None if z_img is None else self.grid
        keep = None if keep_txt is None else sequence_mask(keep_txt, keep_img)
        x = self.trunk(x, m, grid, keep)
        x = F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5)
        text_start = N_HEAD + 1
        text = self.text_out(x[:, text_start : text_start + m])
        if grid is None:
            return Prediction(None, text)
        image_start = text_start + m + 2
        return Prediction(self.image_out(x[:, image_start : image_start + grid[0] * grid[1]]), text)


@lru_cache(maxsize=256)
def _order(
    scans: tuple[tuple[int, int], ...], m: int, grid: tuple[int, int] | None, device: torch.device
) -> Order:
    orders, inverses = zip(*(scan.joint_scan(N_HEAD, m, grid, *s) for s in scans), strict=True)
    return Order(torch.stack(orders, 1).to(device), torch.stack(inverses, 1).to(device))
