"""The diffusion decoder: embedding, Mamba-2 blocks under alternating or parallel scans, two heads.

Shapes: b samples, n image tokens of all images, m text tokens of r rows (r = b unless samples are
packed), l whole sequence, s scans, c latent width, d d_model.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mdm.config import ModelConfig
from mdm.model.adaln import MODULATIONS, modulated
from mdm.model.attention import AttentionBlock
from mdm.model.compiled import compiled
from mdm.model.embedding import Embed
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.linear import Fp32Linear
from mdm.model.mamba2 import Mamba2, Weights, mix
from mdm.model.scan_order import parse_scans
from mdm.model.sequence import Layout, Order, Patterns, pack_order, scan_order, spread

EQ17_LEVEL = 8.0  # log-SNR above which the term of Eq. 17 (App.) no longer grows


class Prediction(NamedTuple):
    """The decoder's outputs for each token."""

    image: Tensor | None  # [b, n, c], v = sqrt(abar) eps - sqrt(1 - abar) z_0
    text: Tensor  # [r, m, c], h of the logits; see `mdm.model.mdm.text_logits`
    pieces: Tensor | None = None  # f32 [r, m, v], further logits of full rank


class _Scan(torch.autograd.Function):
    """x [b, l, d] -> x in the order of every scan [b, l, s, d]; its gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[:, order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _unscan(grad, inverse), None, None


class _Unscan(torch.autograd.Function):
    """y [b, l, s, d] of every scan -> their sum in the order of the sequence [b, l, d]."""

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
    x: Tensor,
    norm: Tensor,
    weights: Weights,
    modulation: Tensor | None,
    scan: Order,
    seq_idx: Tensor | None,
    **settings: Any,
) -> Tensor:
    """Add to x [b, l, d] the mean over its scans of Mamba2(RMSNorm(x)), as a pure function.

    `modulation` [..., l, 3 d] shifts and scales what the mixers read, and scales what is added.
    With `seq_idx` [r, w], x is [1, r w, d]: r rows end to end, and no scan crosses their ends.
    """
    normed, gate = modulated(F.rms_norm(x, x.shape[-1:], norm, eps=1e-5), modulation)
    u: Tensor = _Scan.apply(normed, scan.order, scan.inverse)  # type: ignore[no-untyped-call]
    rows = u if seq_idx is None else u.view(*seq_idx.shape, *u.shape[2:])
    mixed = mix(rows, weights, seq_idx, **settings).view(u.shape)
    total: Tensor = _Unscan.apply(mixed, scan.order, scan.inverse)  # type: ignore[no-untyped-call]
    return x + gate * total / u.shape[2]


class Block(nn.Module):
    """x + the mean over its scans of Mamba2(RMSNorm(x)): a mixer for each scan, in one call.

    With adaLN-single (PixArt, Chen et al. 2024), every token's level and label modulate it: one
    projection serves all blocks, and each adds its own `modulation`.
    """

    def __init__(self, config: ModelConfig, n_scans: int) -> None:
        super().__init__()
        self.modulation: nn.Parameter | None = None
        if config.adaln:
            self.modulation = nn.Parameter(torch.zeros(MODULATIONS * config.d_model))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.mixer = Mamba2(config, n_scans)
        self.compiled = config.kernel == "compiled"
        with torch.no_grad():  # branches start small, so that depth does not matter
            self.mixer.out_proj.weight.mul_((2 * config.n_layer) ** -0.5)

    def forward(
        self,
        x: Tensor,
        scan: Order,
        seq_idx: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """[b, l, d] -> [b, l, d]; see `residual`."""
        if self.modulation is not None and modulation is not None:
            modulation = modulation + self.modulation
        # Once for all blocks: they differ in weights, not in shapes. Not for packed rows, whose
        # length changes at every evaluation.
        run = compiled(residual) if self.compiled and seq_idx is None else residual
        weights, settings = self.mixer.weights, self.mixer.settings
        return run(x, self.norm, weights, modulation, scan, seq_idx, **settings)


def block_scans(config: ModelConfig) -> list[Patterns]:
    """The scans of every block; no two mixers of a block read the same order."""
    image, text = parse_scans(config.scans)
    turns = [(p, text[(p - 1) % len(text)]) for p in image]  # text patterns follow the image's
    if config.scan_mode == "separate":
        others = [(p, q) for p in image for q in text if (p, q) not in turns]
        return [(*turns, *others[-len(text) :])] * config.n_layer
    return [(turns[i % len(turns)],) for i in range(config.n_layer)]


class Trunk(nn.Module):
    """The blocks; with `alternate` block i reads in scan i, with `separate` each in all scans.

    With long skips the last blocks also read the first ones: block n - 1 - i reads
    x + s W [norm(x), norm(x_i)], where x_i is the output of block i, W starts at zero, and
    s = (2 n)^-1/2 as in a block. Reading x itself, each W would multiply the stream and its
    gradient, which then grow exponentially with depth.
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
        self.skips, self.skip_scale = nn.ModuleList(skips), (2 * config.n_layer) ** -0.5
        self.checkpointing = False  # recompute each block in the backward pass

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        keep: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """[b, l, d] -> [b, l, d], modulated by [b, l, 3 d].

        Tokens outside `keep` bool [b, l] are returned unchanged and reach no other token: the rest
        of all samples runs as one packed row.
        """
        orders = {scans: scan_order(layout, scans, x.device) for scans in set(self.scans)}
        if keep is None:
            return self.run(x, orders, None, modulation)
        sample = keep.nonzero()[:, 0].unsqueeze(0)
        packed = {scans: pack_order(order.order, keep) for scans, order in orders.items()}
        kept = None if modulation is None else modulation[keep].unsqueeze(0)
        row = self.run(x[keep].unsqueeze(0), packed, sample, kept)
        x = x.to(row.dtype, copy=True)
        x[keep] = row[0]
        return x

    def run(
        self,
        x: Tensor,
        orders: dict[Patterns, Order],
        seq_idx: Tensor | None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """[b, l, d] -> [b, l, d]; with `seq_idx`, x is [1, l, d] as in `residual`."""
        first = len(self.blocks) - len(self.skips)
        kept: list[Tensor] = []
        for i, (block, scans) in enumerate(zip(self.blocks, self.scans, strict=True)):
            if i >= first:
                read = [F.rms_norm(t, t.shape[-1:], eps=1e-5) for t in (x, kept.pop())]
                x = x + self.skip_scale * self.skips[i - first](torch.cat(read, -1))
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random: there is no generator state to restore.
                inputs = x, orders[scans], seq_idx, modulation
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, orders[scans], seq_idx, modulation)
            if i < len(self.skips):
                kept.append(x)
        return x


class Decoder(nn.Module):
    """Predicts v of image latents and scores of text tokens at given noise levels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embed(config)
        self.trunk = Trunk(config)
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.image_out = nn.Linear(config.d_model, config.latent_dim)
        self.text_out = nn.Linear(config.d_model, config.latent_dim)
        heads = [self.image_out, self.text_out]
        self.piece_out: Fp32Linear | None = None
        if config.text_head == "full":
            self.piece_out = Fp32Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.zeros_(self.piece_out.weight)
        self.eq17_gain: Fp32Linear | None = None
        if config.eq17_logits:
            self.eq17_gain = Fp32Linear(config.d_model, 1)
            heads.append(self.eq17_gain)
        for head in heads:  # predictions start at their mean, b_v alone for text
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(
        self, text: TextInput, class_ids: Tensor, images: ImageInput | None = None
    ) -> Prediction:
        """One denoising evaluation.

        The inputs are not checked, which would wait for a GPU: `mdm.model.inputs.check` checks
        batches where they are collated and requests where they are made.

        Args:
            text: the texts; one for each row, unless packed.
            class_ids: i64 [b] labels, -1 for none.
            images: the images of each sample; None for text alone.
        """
        k = 0 if images is None else images.level.shape[1]
        layout = Layout.of(self.config, text.z_t.shape[1], k)
        x, modulation = self.embed(text, class_ids, images)
        if (rows := text.rows) is not None:
            x = self.trunk.run(x, rows.orders, rows.seq_idx, modulation)
        else:
            keep = None
            if text.keep is not None:
                keep = layout.mask(text.keep, None if images is None else images.keep)
            x = self.trunk(x, layout, keep, modulation)
        x = F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-5)
        tokens, grids = (layout if rows is None else rows).split(x)
        h = self.text_out(tokens)
        if self.eq17_gain is not None:
            term = spread(self._eq17(text.level), None if rows is None else rows.sample_of)
            h = h + term.unsqueeze(-1) * text.z_t
        v = torch.cat([self.image_out(grid) for grid in grids], 1) if grids else None
        pieces = None if self.piece_out is None else self.piece_out(tokens)
        return Prediction(v, h, pieces)

    def _eq17(self, level: Tensor) -> Tensor:
        """The multiple of z_t that Eq. 17 (App.) with eps_hat = 0 adds to h, [b].

        -|z_t - sqrt(abar) mu_v|^2 / 2(1 - abar) is <sqrt(abar) / (1 - abar) z_t, mu_v> plus a term
        that all v share, since all mu_v have one length. The weight is a learned g(t), 0 at first.
        """
        assert self.eq17_gain is not None
        level = level.float().clamp(max=EQ17_LEVEL)
        factor = level.sigmoid().sqrt() / (-level).sigmoid()
        gain: Tensor = self.eq17_gain(self.embed.level(level)).float().squeeze(-1)
        return gain * factor
