"""Networks whose answers are known exactly, to put in place of the decoder."""

import torch
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.model.decoder import Prediction
from mdm.model.embedding import CLEAN
from mdm.model.inputs import ImageInput, TextInput

SURE = 40.0  # logit of a certain token; all others have 0


class Exact(nn.Module):
    """The Bayes-optimal denoiser of a data distribution of K equally likely points.

    A point is an image, a text and a class. E[z_0 | z_t] is the mean of the points under their
    posterior, which all tokens of both modalities, the class and the prompt determine together:
    log p_k = -|z_t - sqrt(abar) z_k|^2 / 2 (1 - abar) + const.
    """

    def __init__(
        self, config: ModelConfig, means: Tensor, z_img: Tensor, tokens: Tensor, classes: Tensor
    ) -> None:
        """Points: normalised images [K, N, C], texts i64 [K, M], classes i64 [K]."""
        super().__init__()
        self.config = config
        self.means = means.double()  # [V, C], orthogonal
        self.z_img, self.tokens, self.classes = z_img.double(), tokens, classes

    def posterior(self, text: TextInput, class_ids: Tensor, images: ImageInput | None) -> Tensor:
        """Probabilities of the points, [B, K]."""
        m = text.z_t.shape[1]
        level = torch.where(text.prompt, CLEAN, text.level.unsqueeze(1))
        log_p = _log_likelihood(text.z_t, level, self.means[self.tokens[:, :m]])
        if images is not None:
            level = images.level.expand(-1, images.z_t.shape[1])
            log_p = log_p + _log_likelihood(images.z_t, level, self.z_img)
        other = (class_ids.unsqueeze(1) >= 0) & (class_ids.unsqueeze(1) != self.classes)
        return log_p.masked_fill(other, -torch.inf).softmax(1)

    def forward(
        self, text: TextInput, class_ids: Tensor, images: ImageInput | None = None
    ) -> Prediction:
        p = self.posterior(text, class_ids, images)
        m, v = text.z_t.shape[1], None
        one_hot = nn.functional.one_hot(self.tokens[:, :m], len(self.means)).double()
        of_tokens = torch.einsum("bk,kmv->bmv", p, one_hot)
        logits = (SURE + of_tokens.log()).clamp(min=0)
        h = logits @ self.means / self.means.square().sum(1).mean()
        if images is not None:
            # z_0 = sqrt(abar) z_t - sqrt(1 - abar) v, solved for v.
            z_0 = torch.einsum("bk,knc->bnc", p, self.z_img)
            level = images.level.double().unsqueeze(2)
            v = (level.sigmoid().sqrt() * images.z_t - z_0) / (-level).sigmoid().sqrt()
            v = v.float()
        return Prediction(v, h.float())


class Conditional(Exact):
    """The point that the conditions determine, whatever is noised; the first one without any."""

    def posterior(self, text: TextInput, class_ids: Tensor, images: ImageInput | None) -> Tensor:
        """One-hot, [B, K]."""
        given = text._replace(level=torch.where(text.level < CLEAN, -torch.inf, text.level))
        if images is not None:
            level = torch.where(images.level < CLEAN, -torch.inf, images.level)
            images = images._replace(level=level)
        p = super().posterior(given, class_ids, images)
        first = torch.eye(len(self.classes))[0].double().expand_as(p)
        return torch.where(p.amax(1, keepdim=True) > 0.999, p, first)


def _log_likelihood(z_t: Tensor, level: Tensor, points: Tensor) -> Tensor:
    """Of z_t [B, N, C] at log-SNR `level` [B, N] if z_0 is a point [K, N, C]: [B, K]."""
    level = level.double()[:, None, :, None]
    away = z_t.double().unsqueeze(1) - level.sigmoid().sqrt() * points
    return -(away.square() / (2 * (-level).sigmoid())).flatten(2).sum(2)
