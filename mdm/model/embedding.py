"""Noisy latents to the sequence `[time][class] [pad text pad] [pad image pad]` (Fig. 2 d, e).

A sample may hold several images: `[pad image pad]` then stands once for each, in order.
"""

import math

import torch
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.packing import TextRows

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
        self.text_in = nn.Linear(
            2 * c, d
        )  # the noisy latent and the last estimate of the clean one
        self.level = NoiseLevel(d)
        self.summary = nn.Linear(d, d)
        nn.init.orthogonal_(self.summary.weight, gain=3.0)  # as loud as a label
        self.class_embedding = nn.Embedding(config.n_classes + 1, d)  # the last row: no class
        self.image_position = nn.Parameter(torch.randn(n_image, d) * 0.02)
        self.text_position = nn.Parameter(torch.randn(config.text_length, d) * 0.02)
        self.time_token = nn.Parameter(torch.randn(d) * 0.02)
        self.pads = nn.Parameter(torch.randn(4, d) * 0.02)  # around the text, around the image

    def forward(
        self,
        z_txt: Tensor,
        estimate_txt: Tensor,
        level_txt: Tensor,
        prompt: Tensor,
        class_ids: Tensor,
        z_img: Tensor | None,
        level_img: Tensor | None,
        image_at: Tensor | None,
    ) -> Tensor:
        """The sequence; see `Decoder.forward` for the arguments."""
        b, m, _ = z_txt.shape
        levels = torch.stack([level_txt, torch.full_like(level_txt, CLEAN)], 1)
        if level_img is not None:
            levels = torch.cat([levels, level_img], 1)
        embedded = self.level(levels)  # [b, 2 + images, d]
        noised, clean = embedded[:, 0:1], embedded[:, 1:2]

        text = self.text_in(torch.cat([z_txt, estimate_txt], -1)) + self.text_position[:m]
        text = text + torch.where(prompt.unsqueeze(-1), clean, noised)
        # The time token tells the level of the last image: former ones are conditions.
        time = self.time_token + embedded[:, 0] + (embedded[:, -1] if z_img is not None else 0)
        label = self._label(class_ids)
        pads = self.pads.unsqueeze(1).expand(-1, b, -1).unsqueeze(2)  # [4, b, 1, d]
        parts = [time.unsqueeze(1), label.unsqueeze(1), pads[0], text, pads[1]]
        if z_img is not None:
            # What a few tokens say among many is heard late in training: the label, and the
            # maximum over the text's tokens, which padding does not dilute, join every patch too.
            told = embedded[:, 2:] + label.unsqueeze(1) + self.summary(text.amax(1)).unsqueeze(1)
            if image_at is not None:  # an image stands where the text's token of that place does
                place = self.text_position[image_at.clamp(min=0)]
                told = told + place * (image_at >= 0).unsqueeze(-1)
            grids = self.image_in(z_img).unflatten(1, (told.shape[1], -1))
            for image in (grids + self.image_position + told.unsqueeze(2)).unbind(1):
                parts += [pads[2], image, pads[3]]
        return torch.cat(parts, 1)

    def packed(
        self,
        z_txt: Tensor,
        estimate_txt: Tensor,
        level_txt: Tensor,
        prompt: Tensor,
        class_ids: Tensor,
        text_of: Tensor,
        rows: TextRows,
    ) -> Tensor:
        """The rows of packed texts, one after the other, [1, r (m + 4), d_model].

        Each text's tokens are those that `forward` gives it alone; see `Decoder.forward`.
        """
        own = text_of.clamp(min=0)
        noised, clean = self.level(torch.stack([level_txt, torch.full_like(level_txt, CLEAN)]))
        text = self.text_in(torch.cat([z_txt, estimate_txt], -1))
        text = text + self.text_position[rows.position]
        text = text + torch.where(prompt.unsqueeze(-1), clean[own], noised[own])
        frame = [self.time_token + noised, self._label(class_ids)]
        frame += [pad.expand(len(noised), -1) for pad in self.pads[:2]]
        tokens = torch.cat([text.flatten(0, 1), *frame])
        x = tokens.new_zeros(rows.seq_idx.numel() + 1, tokens.shape[1])
        places = torch.cat([rows.place.flatten(), rows.frame.flatten()])
        return x.index_copy(0, places, tokens)[:-1].unsqueeze(0)

    def _label(self, class_ids: Tensor) -> Tensor:
        null = self.class_embedding.num_embeddings - 1
        label: Tensor = self.class_embedding(torch.where(class_ids < 0, null, class_ids))
        return label
