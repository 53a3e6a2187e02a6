"""Noisy latents, noise levels and labels to the embedded sequence (Fig. 2 d, e).

Shapes: b samples, m text tokens of r rows, k images a sample, l whole sequence, c latent width,
d d_model.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.adaln import MODULATIONS
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.linear import Fp32Linear
from mdm.model.sequence import join, spread

CLEAN, DROPPED = 20.0, -20.0  # log-SNR of a clean condition and of pure noise, as the network sees
PART = 0.5  # root mean square of each summand of a token at the start: none drowns another


class Embedded(NamedTuple):
    """The sequence that the blocks read. A `NamedTuple`: DeepSpeed's ZeRO-3 hooks know those."""

    x: Tensor  # [b, l, d], or [1, r l, d] of packed samples
    modulation: Tensor | None  # f32 [..., l, 3 d], shift, scale and gate of each token


class NoiseLevel(nn.Module):
    """log-SNR -> [.., d_model]: sinusoids, then a two-layer perceptron, in fp32."""

    frequencies: Tensor

    def __init__(self, d_model: int, n_frequencies: int = 32) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.02), math.log(2.0), n_frequencies))
        self.register_buffer("frequencies", frequencies)
        last = Fp32Linear(d_model, d_model)
        self.mlp = nn.Sequential(Fp32Linear(2 * n_frequencies, d_model), nn.SiLU(), last)
        with torch.no_grad():
            size = self(torch.linspace(DROPPED, CLEAN, 100)).square().mean().sqrt()
            for parameter in last.parameters():
                parameter.mul_(PART / size)

    def forward(self, log_snr: Tensor) -> Tensor:
        """[...] -> f32 [..., d_model]."""
        phase = log_snr.float().clamp(DROPPED, CLEAN).unsqueeze(-1) * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([phase.sin(), phase.cos()], -1))
        return embedded


class Embed(nn.Module):
    """Noisy latents, noise levels and class labels -> token sequence and its modulation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, c = config.d_model, config.latent_dim
        n_image = config.image_height * config.image_width
        self.silent, self.summarizes_tokens = config.silent, config.text_summary == "tokens"

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(PART * torch.randn(*shape))

        self.image_in = nn.Linear(c, d)
        self.text_in = nn.Linear(2 * c, d)  # noisy latent, and last estimate of the clean one
        for patch in (self.image_in, self.text_in):  # of latents with variance 1
            nn.init.normal_(patch.weight, std=PART * c**-0.5)
            nn.init.zeros_(patch.bias)
        self.level = NoiseLevel(d)
        self.class_embedding = nn.Embedding(config.n_classes + 1, d)  # the last row: no class
        nn.init.normal_(self.class_embedding.weight, std=PART)
        self.image_position = learned(n_image, d)
        self.text_position = learned(config.text_length, d)
        self.time_token = learned(d)
        self.pads = learned(4, d)  # around the text, around the image
        self.summary: nn.Linear | None = None
        if config.text_summary != "none":
            self.summary = nn.Linear(d, d)
            # The maximum of m normals is about sqrt(1.3 ln m).
            largest = math.sqrt(1.3 * math.log(max(config.text_length, 4)))
            nn.init.orthogonal_(self.summary.weight, gain=1 / largest)
            nn.init.zeros_(self.summary.bias)
        self.modulation: Fp32Linear | None = None
        if config.adaln:
            self.modulation = Fp32Linear(d, MODULATIONS * d)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self, text: TextInput, class_ids: Tensor, images: ImageInput | None = None
    ) -> Embedded:
        """The sequence; see `Decoder.forward` for the arguments."""
        rows = text.rows
        sample_of, join_all = (None, join) if rows is None else (rows.sample_of, rows.join)
        levels = [text.level, torch.full_like(text.level, CLEAN)]
        levels += [] if images is None else images.level.unbind(1)
        embedded = self.level(torch.stack(levels, 1))  # [b, 2 + k, d]

        def of_tokens(values: Tensor) -> Tensor:
            """[b, 2 + k, ...] for the noised, the clean and each image -> [r, m, ...]."""
            noised, clean = (spread(values[:, i], sample_of) for i in (0, 1))
            return torch.where(text.prompt.unsqueeze(-1), clean, noised)

        kept, position = self._kept(text.level), self.text_position[: text.z_t.shape[1]]
        if rows is not None:
            position = self.text_position[rows.position]
        latents = self._text(text, spread(kept, sample_of).unsqueeze(-1))
        tokens = latents + position + of_tokens(embedded)
        # The time token carries the level of the last image: earlier ones are conditions.
        time = self.time_token + embedded[:, 0] + (0 if images is None else embedded[:, -1])
        class_token, label = self._label(class_ids)
        conditions = embedded[:, :2] + label.unsqueeze(1)
        grids: tuple[Tensor, ...] = ()
        if images is not None:
            condition = embedded[:, 2:] + label.unsqueeze(1)
            # A condition that is one token among many is learned late: the label is added to every
            # patch too. So can be the maximum over the text's tokens, which padding does not
            # dilute; it tells which words there are, but not which belong together.
            if self.summary is not None:
                pooled = tokens if self.summarizes_tokens else latents
                largest = pooled.amax(1) if rows is None else rows.largest(pooled)
                condition = condition + (self.summary(largest) * kept.unsqueeze(-1)).unsqueeze(1)
            if images.at is not None:  # an image takes the position of a text token
                place = self.text_position[images.at.clamp(min=0)]
                condition = condition + place * (images.at >= 0).unsqueeze(-1)
            grids = self._images(images, condition)
            conditions = torch.cat([conditions, condition], 1)
        pads = self.pads.unsqueeze(1).expand(-1, len(label), -1).unsqueeze(2)  # [4, b, 1, d]
        x = join_all((time.unsqueeze(1), class_token.unsqueeze(1)), tokens, grids, pads.unbind(0))
        if self.modulation is None:
            return Embedded(x, None)
        modulated = self._modulate(conditions)
        noised, _, *by_image = modulated.split(1, 1)
        last = by_image[-1] if by_image else noised
        of_images = [
            t.expand(-1, grid.shape[1], -1) for t, grid in zip(by_image, grids, strict=True)
        ]
        frame = (noised,) * 2, (noised, noised, last, last)
        return Embedded(x, join_all(frame[0], of_tokens(modulated), of_images, frame[1]))

    def _images(self, images: ImageInput, condition: Tensor) -> tuple[Tensor, ...]:
        """The tokens of each image, [b, n / k, d], given what its patches share [b, k, d]."""
        z_t = images.z_t.unflatten(1, (condition.shape[1], -1))
        patches = self.image_in(z_t * self._kept(images.level)[..., None, None])
        return tuple((patches + self.image_position + condition.unsqueeze(2)).unbind(1))

    def _modulate(self, condition: Tensor) -> Tensor:
        """Shift, scale and gate under conditions [..., d], f32 [..., 3 d]."""
        assert self.modulation is not None
        modulated: Tensor = self.modulation(F.silu(condition.float()))
        return modulated

    def _kept(self, level: Tensor) -> Tensor:
        """0 where a modality is dropped, so that it is silent; else 1."""
        return (level > DROPPED).float() if self.silent else torch.ones_like(level)

    def _text(self, text: TextInput, kept: Tensor) -> Tensor:
        estimate = torch.zeros_like(text.z_t) if text.estimate is None else text.estimate
        embedded: Tensor = self.text_in(torch.cat([text.z_t, estimate], -1) * kept)
        return embedded

    def _label(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The class token, and what the label adds to patches and modulation, [..., d] each.

        Without a class the token is the last row and not zeros, where every block's RMSNorm would
        multiply gradients by 316.
        """
        null = self.class_embedding.num_embeddings - 1
        token: Tensor = self.class_embedding(torch.where(class_ids < 0, null, class_ids))
        return token, token * (class_ids >= 0).unsqueeze(-1) if self.silent else token
