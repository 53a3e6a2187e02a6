"""The model that is trained, exported and sampled: a decoder inside a noisy-latent VAE."""

from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.decoder import Decoder
from mdm.model.vae import NoisyLatentVAE


class MDM(nn.Module):
    """The decoder, and the VAE whose latents it denoises (Fig. 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.network = Decoder(config)  # the name in checkpoints
        self.vae = NoisyLatentVAE(config.latent_dim, config.vocab_size)


def text_logits(h: Tensor, means: Tensor, bias: Tensor) -> Tensor:
    """Logits over the vocabulary, <h, mu_v> + b_v in fp32.

    Args:
        h: [..., C] from the decoder's text head.
        means: [V, C], the vocabulary's latent means.
        bias: [V].
    """
    return h.float() @ means.T + bias
