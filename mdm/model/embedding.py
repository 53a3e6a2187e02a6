"""Noisy latents, noise levels and labels to the embedded sequence (Fig. 2 d, e).

Shapes: b samples, m text tokens of r rows, l whole sequence, c latent width.
"""

import math

import torch
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.sequence import TextRows, join

CLEAN, DROPPED = 20.0, -20.0  # log-SNR of a clean condition and of pure noise, as the network sees


class NoiseLevel(nn.Module):
    """log-SNR -> [.., d_model]: sinusoids, then a two-layer perceptron, in fp32."""

    frequencies: Tensor

    def __init__(self, d_model: int, n_frequencies: int = 32) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.02), math.log(2.0), n_frequencies))
        self.register_buffer("frequencies", frequencies)
        self.mlp = nn.Sequential(
            nn.Linear(2 * n_frequencies, d_model), nn.SiLU(), nn.Linear(d_model, d_model)
        )

    def forward(self, log_snr: Tensor) -> Tensor:
        """[...] -> [..., d_model]."""
        phase = log_snr.float().clamp(DROPPED, CLEAN).unsqueeze(-1) * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([phase.sin(), phase.cos()], -1))
        return embedded


class Embed(nn.Module):
    """Noisy latents, noise levels and class labels -> token sequence [b, l, d_model]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, c = config.d_model, config.latent_dim
        n_image = config.image_height * config.image_width
        self.image_in = nn.Linear(c, d)
        self.text_in = nn.Linear(2 * c, d)  # noisy latent, and last estimate of the clean one
        self.level = NoiseLevel(d)
        self.summary = nn.Linear(d, d)
        nn.init.orthogonal_(self.summary.weight, gain=3.0)  # as large as a label
        self.class_embedding = nn.Embedding(config.n_classes + 1, d)  # the last row: no class
        self.image_position = nn.Parameter(torch.randn(n_image, d) * 0.02)
        self.text_position = nn.Parameter(torch.randn(config.text_length, d) * 0.02)
        self.time_token = nn.Parameter(torch.randn(d) * 0.02)
        self.pads = nn.Parameter(torch.randn(4, d) * 0.02)  # around the text, around the image

    def forward(
        self, text: TextInput, class_ids: Tensor, images: ImageInput | None = None
    ) -> Tensor:
        """The sequence [b, l, d_model]; see `Decoder.forward` for the arguments."""
        b, m, _ = text.z_t.shape
        levels = [text.level, torch.full_like(text.level, CLEAN)]
        levels += [] if images is None else images.level.unbind(1)
        embedded = self.level(torch.stack(levels, 1))  # [b, 2 + images, d]
        noised, clean = embedded[:, 0:1], embedded[:, 1:2]

        tokens = self._text(text) + self.text_position[:m]
        tokens = tokens + torch.where(text.prompt.unsqueeze(-1), clean, noised)
        # The time token carries the level of the last image: earlier ones are conditions.
        time = self.time_token + embedded[:, 0] + (0 if images is None else embedded[:, -1])
        label = self._label(class_ids)
        grids: tuple[Tensor, ...] = ()
        if images is not None:
            # The model is slow to learn a condition that is a few tokens among many: the label,
            # and the maximum over the text's tokens, which padding does not dilute, are added to
            # every patch too.
            condition = embedded[:, 2:] + label.unsqueeze(1)
            condition = condition + self.summary(tokens.amax(1)).unsqueeze(1)
            if images.at is not None:  # an image takes the position of a text token
                place = self.text_position[images.at.clamp(min=0)]
                condition = condition + place * (images.at >= 0).unsqueeze(-1)
            patches = self.image_in(images.z_t).unflatten(1, (condition.shape[1], -1))
            grids = (patches + self.image_position + condition.unsqueeze(2)).unbind(1)
        pads = self.pads.unsqueeze(1).expand(-1, b, -1).unsqueeze(2)  # [4, b, 1, d]
        return join((time.unsqueeze(1), label.unsqueeze(1)), tokens, grids, pads.unbind(0))

    def packed(self, text: TextInput, class_ids: Tensor, rows: TextRows) -> Tensor:
        """The rows of packed texts, one after the other, [1, r (m + 4), d_model].

        Each text's tokens are the same as in its own sequence from `forward`.
        """
        noised, clean = self.level(torch.stack([text.level, torch.full_like(text.level, CLEAN)]))
        tokens = self._text(text) + self.text_position[rows.position]
        level = torch.where(text.prompt.unsqueeze(-1), clean[rows.text_of], noised[rows.text_of])
        frame = [self.time_token + noised, self._label(class_ids)]
        frame += [pad.expand(len(noised), -1) for pad in self.pads[:2]]
        tokens = torch.cat([(tokens + level).flatten(0, 1), *frame])
        x = tokens.new_zeros(rows.seq_idx.numel() + 1, tokens.shape[1])
        places = torch.cat([rows.place.flatten(), rows.frame.flatten()])
        return x.index_copy(0, places, tokens)[:-1].unsqueeze(0)

    def _text(self, text: TextInput) -> Tensor:
        estimate = torch.zeros_like(text.z_t) if text.estimate is None else text.estimate
        embedded: Tensor = self.text_in(torch.cat([text.z_t, estimate], -1))
        return embedded

    def _label(self, class_ids: Tensor) -> Tensor:
        null = self.class_embedding.num_embeddings - 1
        label: Tensor = self.class_embedding(torch.where(class_ids < 0, null, class_ids))
        return label
