"""The noisy-latent VAE (Sec. 4.1, 4.2.2): patches and tokens to Gaussians over one latent width.

Shapes: b batch, n image tokens, m text tokens, c latent width, v vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA_FLOOR = 0.05  # below it the KL term's gradient vanishes and nearby latents collapse


class Vocabulary(nn.Module):
    """Latent means mu_v of all tokens, and the bias b_v of each token's logit."""

    def __init__(self, vocab_size: int, latent_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, latent_dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(mu [v, c] with root-mean-square 1, b [v]), in fp32."""
        weight = self.weight.float()
        return F.rms_norm(weight, weight.shape[-1:], eps=1e-6), self.bias.float()


class NoisyLatentVAE(nn.Module):
    """Maps between data and latents of one width for both modalities."""

    image_running_mean: Tensor
    image_running_var: Tensor

    def __init__(self, latent_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.image_mean = nn.Linear(latent_dim, latent_dim)
        self.image_log_sigma = nn.Linear(latent_dim, latent_dim)
        self.image_decoder = nn.Linear(latent_dim, latent_dim)
        self.vocabulary = Vocabulary(vocab_size, latent_dim)
        self.text_log_sigma = nn.Linear(latent_dim, latent_dim)
        self.text_decoder = nn.Linear(latent_dim, vocab_size)
        # First-stage latents are already normalised: start as the identity.
        for identity in (self.image_mean, self.image_decoder):
            nn.init.eye_(identity.weight)
            nn.init.zeros_(identity.bias)
        for log_sigma in (self.image_log_sigma, self.text_log_sigma):
            nn.init.zeros_(log_sigma.weight)
            nn.init.constant_(log_sigma.bias, -2.5)
        self.register_buffer("image_running_mean", torch.zeros(latent_dim))
        self.register_buffer("image_running_var", torch.ones(latent_dim))

    def encode_image(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """First-stage latents [b, n, c] -> (mean, sigma), [b, n, c] each, in fp32."""
        return self.image_mean(patches).float(), _sigma(self.image_log_sigma(patches))

    def decode_image(self, s: Tensor) -> Tensor:
        """Unnormalised latents [b, n, c] -> first-stage latents [b, n, c]."""
        patches: Tensor = self.image_decoder(s)
        return patches

    def track(self, mean: Tensor, var: Tensor, momentum: float = 0.01) -> None:
        """Move the running statistics of image latents towards a global batch's, [c] each."""
        self.image_running_mean.lerp_(mean, momentum)
        self.image_running_var.lerp_(var, momentum)

    def normalize_image(self, s: Tensor) -> Tensor:
        """Latents with mean 0 and variance 1 a channel, by the running statistics."""
        return (s - self.image_running_mean) * (self.image_running_var + 1e-6).rsqrt()

    def denormalize_image(self, z_0: Tensor) -> Tensor:
        """Inverse of `normalize_image`."""
        return z_0 * (self.image_running_var + 1e-6).sqrt() + self.image_running_mean

    def text_sigma(self, mean: Tensor) -> Tensor:
        """Standard deviation [..., c] around a token's mean [..., c]."""
        return _sigma(self.text_log_sigma(mean))

    def decode_text(self, s: Tensor) -> Tensor:
        """Latents [b, m, c] -> logits [b, m, v] (p_psi of Eq. 16)."""
        logits: Tensor = self.text_decoder(s)
        return logits


def kl(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) (Eq. 17), summed over the last axis."""
    return 0.5 * (mean**2 + sigma**2 - 1 - 2 * sigma.log()).sum(-1)


def _sigma(log_sigma: Tensor) -> Tensor:
    return log_sigma.float().exp() + SIGMA_FLOOR
