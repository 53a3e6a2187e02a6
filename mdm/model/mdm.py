"""The model that is trained, exported and sampled: a decoder inside a noisy-latent VAE."""

from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.decoder import Decoder, Prediction
from mdm.model.vae import NoisyLatentVAE
from mdm.utils.precision import fp32


class MDM(nn.Module):
    """The decoder, and the VAE whose latents it denoises (Fig. 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.network = Decoder(config)  # the name in checkpoints
        self.vae = NoisyLatentVAE(config.latent_dim, config.vocab_size)


def text_logits(prediction: Prediction, means: Tensor, bias: Tensor) -> Tensor:
    """Logits over the vocabulary, <h, mu_v> + w_v x + b_v, f32 [R, M, V] whatever the autocast.

    <h, mu_v> alone has the rank C of a latent: it cannot be equally sure of any two pieces.

    Args:
        prediction: of the decoder.
        means: [V, C], the vocabulary's latent means.
        bias: [V].
    """
    h = prediction.text
    with fp32(h.device):
        logits = h.float() @ means.T + bias
    return logits if prediction.pieces is None else logits + prediction.pieces
