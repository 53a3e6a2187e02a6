"""The diffusion decoder: embed, Mamba-2 blocks under alternating or parallel scans, two heads.

Shapes: b batch, n image tokens of all k images, m text tokens, l whole sequence, c latent width,
d d_model.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mdm.config import ModelConfig
from mdm.model import scan_order as scan
from mdm.model.attention import AttentionBlock
from mdm.model.compiled import Compiled
from mdm.model.embedding import Embed
from mdm.model.inputs import check_inputs
from mdm.model.mamba2 import Mamba2, Weights, mix
from mdm.model.packing import N_HEAD, TextRows, pack_order, sequence_mask, text_rows

EQ17_LEVEL = 8.0  # log-SNR from which on Eq. 17's term grows no more: a token is certain there


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
    """Sum of x [b, l, d] and the mean over its scans of Mamba2(RMSNorm(x)), as a pure function.

    With `seq_idx` [r, w] x is [1, r w, d]: r rows end to end, none of which a scan leaves.
    """
    normed = F.rms_norm(x, x.shape[-1:], norm, eps=1e-5)
    u: Tensor = _Scan.apply(normed, *scan)  # type: ignore[no-untyped-call]
    rows = u if seq_idx is None else u.view(*seq_idx.shape, *u.shape[2:])
    mixed = mix(rows, weights, seq_idx, **settings).view(u.shape)
    total: Tensor = _Unscan.apply(mixed, *scan)  # type: ignore[no-untyped-call]
    return x + total / u.shape[2]


# Compiled once for all blocks: they differ in weights, not in shapes.
_compiled_residual = Compiled(residual)


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
        # Packed rows differ in length at every evaluation: not worth compiling.
        run = _compiled_residual if self.compiled and seq_idx is None else residual
        return run(x, self.norm, self.mixer.weights, scan, seq_idx, **self.mixer.settings)


def block_scans(config: ModelConfig) -> list[tuple[tuple[int, int], ...]]:
    """(image pattern, text pattern) of every scan of every block."""
    image, text = scan.parse_scans(config.scans)
    turns = [(p, text[(p - 1) % len(text)]) for p in image]  # the text turns with the image
    if config.scan_mode == "separate":
        return [(*turns, *((p, p) for p in text))] * config.n_layer
    return [(turns[i % len(turns)],) for i in range(config.n_layer)]


class Trunk(nn.Module):
    """The blocks; with `alternate` block i reads in scan i, with `separate` each in all scans.

    With long skips the last blocks also hear the first: block n - 1 - i reads x + W [x, x_i] with
    x_i the output of block i, W zero at the start.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scans = block_scans(config)
        kind = AttentionBlock if config.decoder == "transformer" else Block
        self.blocks = nn.ModuleList(kind(config, len(scans)) for scans in self.scans)
        width = config.d_model
        joined = config.n_layer // 2 if config.long_skip else 0
        skips = [nn.Linear(2 * width, width, bias=False) for _ in range(joined)]
        for skip in skips:
            nn.init.zeros_(skip.weight)
        self.skips = nn.ModuleList(skips)
        self.checkpointing = False  # recompute each block in the backward pass

    @property
    def compiled(self) -> bool:
        """Whether the blocks run compiled, which takes seconds for every new shape."""
        return any(isinstance(block, Block) and block.compiled for block in self.blocks)

    @compiled.setter
    def compiled(self, on: bool) -> None:
        for block in self.blocks:
            if isinstance(block, Block):
                block.compiled = on

    def forward(
        self,
        x: Tensor,
        m: int,
        grid: tuple[int, int] | None,
        images: int = 1,
        keep: Tensor | None = None,
    ) -> Tensor:
        """[b, l, d] -> [b, l, d], for m text tokens and the image tokens of `images` grids.

        Tokens outside `keep` bool [b, l] come back as they went in, and no other token hears of
        them: what is left of all samples runs as one packed row.
        """
        orders = {scans: _order(scans, m, grid, images, x.device) for scans in set(self.scans)}
        if keep is None:
            return self._run(x, orders, None)
        sample = keep.nonzero()[:, 0].unsqueeze(0)
        packed = {k: Order(*pack_order(order.order, keep)) for k, order in orders.items()}
        row = self._run(x[keep].unsqueeze(0), packed, sample)
        x = x.to(row.dtype, copy=True)
        x[keep] = row[0]
        return x

    def packed(self, x: Tensor, rows: TextRows) -> Tensor:
        """[1, l, d] -> [1, l, d]: rows of packed texts end to end, none of which hears another."""
        m = rows.place.shape[1]
        orders = {
            scans: Order(*rows.order(_order(scans, m, None, 1, x.device).order))
            for scans in set(self.scans)
        }
        return self._run(x, orders, rows.seq_idx)

    def _run(
        self,
        x: Tensor,
        orders: dict[tuple[tuple[int, int], ...], Order],
        seq_idx: Tensor | None,
    ) -> Tensor:
        first = len(self.blocks) - len(self.skips)
        kept: list[Tensor] = []
        for i, (block, scans) in enumerate(zip(self.blocks, self.scans, strict=True)):
            if i >= first:
                x = x + self.skips[i - first](torch.cat([x, kept.pop()], -1))
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random: there is no state of a generator to restore.
                x = checkpoint(
                    block,
                    *(x, orders[scans], seq_idx),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = block(x, orders[scans], seq_idx)
            if i < len(self.skips):
                kept.append(x)
        return x


class Decoder(nn.Module):
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
        self.eq17_gain: nn.Linear | None = None
        if config.eq17_logits:
            self.eq17_gain = nn.Linear(config.d_model, 1)
            nn.init.zeros_(self.eq17_gain.weight)
            nn.init.zeros_(self.eq17_gain.bias)

    def forward(
        self,
        z_txt: Tensor,
        level_txt: Tensor,
        prompt: Tensor,
        class_ids: Tensor,
        z_img: Tensor | None = None,
        level_img: Tensor | None = None,
        estimate_txt: Tensor | None = None,
        image_at: Tensor | None = None,
        keep_txt: Tensor | None = None,
        keep_img: Tensor | None = None,
        text_of: Tensor | None = None,
    ) -> Prediction:
        """One denoising evaluation.

        Args:
            z_txt: [b, m, c] noisy text latents; clean ones where `prompt`.
            level_txt: [b] log-SNR of the text tokens outside the prompt.
            prompt: bool [b, m], text tokens that are clean conditions.
            class_ids: [b] labels, -1 for none.
            z_img: [b, n, c] noisy latents of k images, one after the other; None for text alone.
            level_img: [b, k] log-SNR of each image's tokens, or [b] for all of them.
            estimate_txt: [b, m, c] the last estimate of the clean text, zeros without one.
            image_at: i64 [b, k] the text token at whose place an image stands, -1 for an image
                beside the whole text; None: all beside it.
            keep_txt: bool [b, m], text tokens that the blocks read; all of them without it.
            keep_img: bool [b, n], the same of the image; given where `keep_txt` is.
            text_of: i64 [r, m] which of b packed texts a token belongs to, as
                `mdm.model.packing.Texts` has it; what else is [b, m] above is then [r, m].

        Returns:
            `Prediction`.

        Raises:
            ValueError: shapes or dtypes that do not fit, with both values.
        """
        k = check_inputs(
            self.config,
            z_txt,
            level_txt=level_txt,
            prompt=prompt,
            class_ids=class_ids,
            z_img=z_img,
            level_img=level_img,
            estimate_txt=estimate_txt,
            image_at=image_at,
            keep_txt=keep_txt,
            keep_img=keep_img,
            text_of=text_of,
        )
        if estimate_txt is None:
            estimate_txt = torch.zeros_like(z_txt)
        if text_of is not None:
            return self._packed(z_txt, estimate_txt, level_txt, prompt, class_ids, text_of)
        if level_img is not None:
            level_img = level_img.view(len(level_img), -1).expand(-1, k)
        x = self.embed(
            z_txt, estimate_txt, level_txt, prompt, class_ids, z_img, level_img, image_at
        )
        m = z_txt.shape[1]
        keep = None if keep_txt is None else sequence_mask(keep_txt, keep_img, k)
        x = self.trunk(x, m, None if z_img is None else self.grid, k, keep)
        x = F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5)
        start = N_HEAD + 1
        text = self.text_out(x[:, start : start + m])
        if self.eq17_gain is not None:
            text = text + self._eq17(level_txt) * z_txt
        n = self.grid[0] * self.grid[1]
        starts = [start + m + 2 + i * (n + 2) for i in range(k)]
        images = [self.image_out(x[:, s : s + n]) for s in starts]
        return Prediction(torch.cat(images, 1) if images else None, text)

    def _packed(
        self,
        z_txt: Tensor,
        estimate_txt: Tensor,
        level_txt: Tensor,
        prompt: Tensor,
        class_ids: Tensor,
        text_of: Tensor,
    ) -> Prediction:
        rows = text_rows(text_of, len(class_ids))
        x = self.embed.packed(z_txt, estimate_txt, level_txt, prompt, class_ids, text_of, rows)
        x = self.trunk.packed(x, rows).squeeze(0)
        x = x[rows.place.clamp(max=len(x) - 1)]
        text = self.text_out(F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5))
        if self.eq17_gain is not None:
            text = text + self._eq17(level_txt).squeeze(-1)[text_of.clamp(min=0)] * z_txt
        return Prediction(None, text)

    def _eq17(self, level: Tensor) -> Tensor:
        """What Eq. 17 with eps_hat = 0 adds to h as a multiple of z_t, [b, 1, 1].

        -|z_t - sqrt(abar) mu_v|^2 / 2(1 - abar) is <sqrt(abar) / (1 - abar) z_t, mu_v> and a term
        that all v share, for all mu_v are of one length. Weighted by a learned g(t), 0 at first.
        """
        assert self.eq17_gain is not None
        level = level.float().clamp(max=EQ17_LEVEL)
        factor = level.sigmoid().sqrt() / (-level).sigmoid()
        gain: Tensor = self.eq17_gain(self.embed.level(level)).float().squeeze(-1)
        return (gain * factor)[:, None, None]


@lru_cache(maxsize=256)
def _order(
    scans: tuple[tuple[int, int], ...],
    m: int,
    grid: tuple[int, int] | None,
    images: int,
    device: torch.device,
) -> Order:
    found = [scan.joint_scan(N_HEAD, m, grid, *s, images) for s in scans]
    orders, inverses = zip(*found, strict=True)
    return Order(torch.stack(orders, 1).to(device), torch.stack(inverses, 1).to(device))
