"""Bits per character of text under the diffusion: a variational bound of -log p(tokens).

The generative model of M tokens is the reverse diffusion of their latents from N(0, I) at the
noisiest level of the text's schedule to the least noisy one, and then a choice of each token from
the network's scores there. With a = abar = sigmoid(l) at log-SNR l, the noisy latent of token v is

    q(z_l | v) = N(sqrt(a) mu_v, V_v),   V_v = 1 - a + a sigma_v^2

because z_0 is itself mu_v + sigma_v noise (Sec. 4.1). The forward process dz = -b/2 z dt + sqrt(b)
dW is the same for all tokens, with b dt = (1 - a) dl. The reverse process has the same diffusion
and follows the score that the scores s_v of the network imply, so that the KL divergence of the two
paths is that of their drifts (Girsanov; Song et al. 2021, Theorem 1 and Corollary 1):

    -log p(x) <=  KL(q(z_low | x) || N(0, I))                                     prior
                + 1/2 int_low^high (1 - a) E|score_x - sum_v s_v score_v|^2 dl    diffusion
                + E[-sum_i log s_{x_i}(z_high)]                                   reconstruction

    with score_v = -(z_l - sqrt(a) mu_v) / V_v

For sigma = 0 the second term is 1/2 int |mu_x - x_hat|^2 dSNR with x_hat = sum_v s_v mu_v: the
variational diffusion model's (Kingma et al. 2021, Eq. 15; Gulrajani & Hashimoto 2023, Sec. 2).

Given z_high, tokens are independent of each other in the reconstruction. Any s that is a function
of z_l gives a bound; the score of the exact posterior gives the smallest, which exceeds -log p by
the divergence of q(z_low) from N(0, I). Self-conditioning keeps it a bound, because the estimate
that the network sees is that of another pass at the same z_l.

Shapes: B texts, M tokens, C latent width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm.diffusion import schedule
from mdm.model.inputs import TextInput
from mdm.model.mdm import MDM, text_logits

# Logits [B, M, V] of the tokens, given z [B, M, C] and its log-SNR [B].
Denoiser = Callable[[Tensor, Tensor], Tensor]


class Latents(NamedTuple):
    """The Gaussian around the latent of each token of the vocabulary."""

    mean: Tensor  # [V, C], mu_v
    sigma: Tensor  # [V, C]

    def noised(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [..., V, C] of z at log-SNRs [...]."""
        a = log_snr.sigmoid()[..., None, None]
        return a.sqrt() * self.mean, 1 - a + a * self.sigma.square()


class TextBound(NamedTuple):
    """An upper bound of -log p of each text, in nats, as a sum of its parts."""

    prior: Tensor  # [B]
    levels: Tensor  # [B, levels], of equally wide ranges of log-SNR, from noise to data
    reconstruction: Tensor  # [B]

    @property
    def diffusion(self) -> Tensor:
        """All levels, [B]."""
        return self.levels.sum(1)

    @property
    def total(self) -> Tensor:
        """The bound, [B]."""
        return self.prior + self.diffusion + self.reconstruction


@torch.no_grad()
def text_bound(
    denoiser: Denoiser, latents: Latents, tokens: Tensor, generator: torch.Generator, levels: int
) -> TextBound:
    """A bound of -log p(tokens) of each text [B], an unbiased estimate of its expectation.

    The integral over log-SNR is estimated at `levels` evenly spaced places, whose common offset is
    drawn for each text; one more evaluation of the network gives the reconstruction.

    Args:
        denoiser: scores of all tokens.
        latents: of the vocabulary.
        tokens: i64 [B, M].
        generator: of the noise.
        levels: evaluations of the integrand for each text, at least 1.
    """
    high, low = schedule.TEXT.log_snr_range()
    # Evenly spread offsets in random order: texts in a batch help each other.
    b = len(tokens)
    offset = (torch.randperm(b, generator=generator) + torch.rand(b, generator=generator)) / b
    paid = []
    for level in range(levels):
        log_snr = low + (high - low) * (level + offset) / levels
        z = _draw(latents, tokens, log_snr, generator)
        gap = _score_gap(denoiser(z, log_snr), latents, tokens, z, log_snr)
        paid.append((high - low) / levels * 0.5 * (-log_snr).sigmoid() * gap)
    end = torch.full((b,), high)
    log_s = denoiser(_draw(latents, tokens, end, generator), end).log_softmax(-1)
    reconstruction = -log_s.gather(-1, tokens.unsqueeze(-1)).sum((1, 2))
    return TextBound(_prior(latents, tokens, low), torch.stack(paid, 1), reconstruction)


def network_denoiser(model: MDM, self_conditions: bool) -> Denoiser:
    """The scores of a model for texts alone, as its sampler computes them.

    With `self_conditions`, the network sees its own estimate from a first pass at the same z.
    """
    means, bias = model.vae.vocabulary()

    def scores(z: Tensor, log_snr: Tensor) -> Tensor:
        prompt = torch.zeros(z.shape[:2], dtype=torch.bool)
        text = TextInput(z, log_snr, prompt)
        class_ids = torch.full((len(z),), -1)
        for last in (False, True) if self_conditions else (True,):
            logits = text_logits(model.network(text, class_ids), means, bias)
            if not last:
                text = text._replace(estimate=logits.softmax(-1) @ means)
        return logits

    return scores


def latents_of(model: MDM) -> Latents:
    """The latents of a model's vocabulary."""
    means, _ = model.vae.vocabulary()
    return Latents(means.detach(), model.vae.text_sigma(means).detach())


def per_character(
    nats: NDArray[np.float64], characters: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[float, float]:
    """Bits per character of texts [n], and its standard error.

    Texts of one group, such as a file's, are not independent: the error is that of a ratio of sums
    over groups (Cochran 1977, Eq. 6.13).
    """
    _, group = np.unique(groups, return_inverse=True)
    bits = np.bincount(group, nats) / np.log(2)
    count = np.bincount(group, characters).astype(float)
    ratio = bits.sum() / count.sum()
    n = len(bits)
    variance = n / (n - 1) * np.square(bits - ratio * count).sum() / count.sum() ** 2
    return float(ratio), float(np.sqrt(variance))


def _draw(latents: Latents, tokens: Tensor, log_snr: Tensor, generator: torch.Generator) -> Tensor:
    """Z [B, M, C] of the tokens at log-SNRs [B]."""
    mean, sigma = latents.mean[tokens], latents.sigma[tokens]
    z_0 = mean + sigma * torch.randn(mean.shape, generator=generator)
    eps = torch.randn(mean.shape, generator=generator)
    return schedule.noised(z_0, eps, log_snr.sigmoid()[:, None, None])


def _score_gap(
    logits: Tensor, latents: Latents, tokens: Tensor, z: Tensor, log_snr: Tensor
) -> Tensor:
    """|score_x - sum_v s_v score_v|^2 summed over the tokens of each text, [B]."""
    mean, variance = latents.noised(log_snr)  # [B, V, C]
    s = logits.softmax(-1)
    shift, scale = s @ (mean / variance), s @ (1 / variance)
    index = tokens.unsqueeze(-1).expand(-1, -1, z.shape[-1])
    mean_x, variance_x = mean.gather(1, index), variance.gather(1, index)
    gap = (mean_x - z) / variance_x - (shift - scale * z)
    return gap.square().sum((1, 2))


def _prior(latents: Latents, tokens: Tensor, low: float) -> Tensor:
    """KL(q(z_low | x) || N(0, I)) of each text, [B]."""
    mean, variance = latents.noised(torch.tensor(low))
    divergence = 0.5 * (mean.square() + variance - 1 - variance.log()).sum(-1)
    return divergence[tokens].sum(1)
