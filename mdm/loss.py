"""The loss (Eq. 18): noise both modalities at their own levels, score the prediction.

Shapes: B batch, I images a sample, N image tokens of all of them, R rows and M text tokens (R = B
unless samples are packed), C latent width, V vocabulary, K candidates.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mdm.config import Config
from mdm.data.batch import Batch
from mdm.diffusion import noise, schedule
from mdm.diffusion.levels import Levels, draw_levels, self_condition_shares
from mdm.diffusion.score_entropy import (
    energy,
    log_ratio,
    log_ratio_vocabulary,
    log_score_ratio,
    noise_cross_entropy,
    score_entropy,
)
from mdm.diffusion.time_warp import TimeWarp
from mdm.first_stage.tokenizer import PAD
from mdm.model.decoder import Prediction
from mdm.model.embedding import CLEAN, DROPPED
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.mdm import MDM, text_logits
from mdm.model.sequence import Layout, Rows, Samples, pack_rows
from mdm.model.vae import kl
from mdm.utils.precision import fp32

MAX_SNR = 5.0  # gamma of min-SNR
CAP = 20.0  # of the weight 1 / abar of noise errors, with image_weight v_capped


class LossTerms(NamedTuple):
    """Scalars in fp32; a term of a modality that the batch lacks is 0."""

    total: Tensor
    rec_img: Tensor  # Eq. 15
    rec_txt: Tensor  # Eq. 16
    kl: Tensor  # Eq. 17, without its weight
    eps_img: Tensor  # 1/2 |eps - eps_hat|^2 / abar, a mean over a token's numbers
    se_img: Tensor  # score entropy over image candidates
    se_txt: Tensor  # score entropy over the vocabulary
    conditioning: Tensor  # i64 [B], index into CONDITIONINGS
    per_sample: Tensor  # [B, 3], eps_img, se_img and se_txt of each sample, detached


class NoisyText(NamedTuple):
    """Texts at their noise levels, and the loss terms of the VAE alone."""

    input: TextInput
    abar: Tensor  # [R, M], or [B, 1] unless packed
    tokens: Tensor  # i64 [R, M]
    means: Tensor  # [V, C], mu_v
    bias: Tensor  # [V]
    rec: Tensor  # Eq. 16
    kl: Tensor


class NoisyImage(NamedTuple):
    """Images at their noise levels, and the loss terms of the VAE alone."""

    input: ImageInput
    z_0: Tensor  # [B, N, C], normalised, detached
    eps: Tensor  # [B, N, C]
    abar: Tensor  # [B, I]
    rec: Tensor  # Eq. 15
    kl: Tensor


class NoisyInputs(NamedTuple):
    """A batch as the decoder reads it."""

    levels: Levels
    samples: Samples
    text: NoisyText
    image: NoisyImage | None


class Loss(nn.Module):
    """The model and its loss; all randomness comes from (seed, sample, epoch).

    State-dict names are those of `MDM`, whose modules it holds.
    """

    def __init__(self, config: Config, log_unigram: NDArray[np.float32] | None = None) -> None:
        """With `log_unigram` [V] of the tokenizer's corpus as the text bias at the start."""
        super().__init__()
        self.seed, self.weights, self.model = config.seed, config.objective, config.model
        self.grid = config.model.image_height * config.model.image_width  # tokens of an image
        model = MDM(config.model)
        self.network, self.vae = model.network, model.vae
        if log_unigram is not None:
            with torch.no_grad():
                self.vae.vocabulary.bias.copy_(torch.from_numpy(log_unigram))
        self.network.trunk.checkpointing = config.train.activation_checkpointing
        self.text_warp = TimeWarp(config.model.vocab_size) if self.weights.text_warp else None

    def forward(self, batch: Batch, step: int) -> LossTerms:
        """Loss terms of one rank's share of a global step.

        Args:
            batch: on the CPU, where its noise is drawn; its loader has checked it.
            step: the global step.
        """
        levels, samples, text, image = noisy = self.noise_inputs(batch)
        prediction = self.predict(noisy, self.estimate(noisy, step))

        logits = text_logits(prediction, text.means, text.bias)
        se_txt = self.text_loss(logits, text, samples) * levels.scores_txt  # [B]
        if self.text_warp is not None and self.training:
            self.text_warp.update(levels.t_txt, se_txt)
        rec_img, kl_term = se_txt.new_zeros(()), text.kl
        eps_img = se_img = se_txt.new_zeros(len(batch))
        if image is not None and prediction.image is not None:
            rec_img, kl_term = image.rec, text.kl + image.kl
            by_image = self.image_loss(prediction.image.float(), image, levels.t_img)
            eps_img, se_img = ((term * levels.scores_img).sum(1) for term in by_image)

        # Means over all samples, not over the noisy ones: ranks then average to the global loss.
        terms = samples.average(eps_img), samples.average(se_img), samples.average(se_txt)
        w = self.weights
        total = (  # Eq. 18
            rec_img
            + text.rec
            + w.beta_kl * kl_term
            + w.lambda_se * (w.eps_image * terms[0] + w.se_image * terms[1] + terms[2])
        )
        per_sample = torch.stack([eps_img, se_img, se_txt], 1).detach()
        return LossTerms(total, rec_img, text.rec, kl_term, *terms, levels.conditioning, per_sample)

    def noise_inputs(self, batch: Batch) -> NoisyInputs:
        """Latents of both modalities, each at its own noise level, on the device of the weights."""
        n = 0 if batch.latents is None else batch.latents.shape[1]
        m, c = batch.tokens.shape[1], self.model.latent_dim
        device = self.vae.image_running_mean.device
        draws = noise.draw(self.seed, batch.keys, batch.epochs, n, m, c, batch.text_of).to(device)
        rows = None
        if batch.text_of is not None:
            layout = Layout.of(self.model, m, n // self.grid)
            scans = self.network.trunk.scans
            rows = pack_rows(batch.text_of, len(batch), layout, scans, device)
        batch = batch.to(device)
        samples = _samples(batch)
        levels = self.draw_levels(draws.uniforms, batch)
        text = self._noise_text(batch, draws, levels, samples, rows)
        image = None
        if batch.latents is not None:
            image = self._noise_image(batch.latents, batch.image_at, draws, levels.t_img, samples)
        return NoisyInputs(levels, samples, text, image)

    def estimate(self, noisy: NoisyInputs, step: int) -> Tensor | None:
        """The network's own estimate of the clean texts that it shall see, zeros for the others.

        [R, M, C], or None in a step that computes none.
        """
        share, _ = self_condition_shares(self.weights.p_self_condition)
        if noise.uniform(self.seed, step) >= share:  # the same on every rank
            return None
        text = noisy.text
        with torch.no_grad():
            logits = text_logits(self.predict(noisy), text.means, text.bias)
            seen = noisy.samples.spread(noisy.levels.self_conditions).unsqueeze(-1)
            with fp32(logits.device):
                return logits.softmax(-1) @ text.means * seen

    def draw_levels(self, uniforms: Tensor, batch: Batch) -> Levels:
        """Noise levels and kept classes from uniforms [B, 8]; see `mdm.diffusion.levels`."""
        images = 0 if batch.latents is None else batch.latents.shape[1] // self.grid
        steps = None if self.text_warp is None else self.text_warp.steps
        length = _samples(batch).sums(batch.prompt.long())  # of the prompt
        asks = length > 0
        if batch.image_at is not None:  # an image in the reply is not what the prompt asks about
            asks &= batch.image_at[:, -1] < length
        return draw_levels(self.weights, uniforms, images, batch.class_ids, asks, steps)

    def predict(self, noisy: NoisyInputs, estimate: Tensor | None = None) -> Prediction:
        """The decoder's prediction, given its last `estimate` of the clean text [R, M, C]."""
        text = noisy.text.input._replace(estimate=estimate)
        image = None if noisy.image is None else noisy.image.input
        prediction: Prediction = self.network(text, noisy.levels.class_ids, image)
        return prediction

    def text_loss(self, logits: Tensor, text: NoisyText, samples: Samples) -> Tensor:
        """Score entropy of `logits` [R, M, V] (Eq. 4), a mean outside the prompt, [B]."""
        if self.weights.target == "theorem1":
            with torch.no_grad():  # depends only on z_t and the vocabulary, not on the context
                abar = text.abar.clamp(max=1 - 1e-6).expand(text.tokens.shape)
                log_r = log_score_ratio(log_ratio_vocabulary(text.input.z_t, text.means, abar))
            per_token = score_entropy(log_score_ratio(logits), log_r)
        else:  # with a one-hot target: cross-entropy
            per_token = _cross_entropy(logits, text.tokens)
        weight = ~text.input.prompt * torch.where(text.tokens == PAD, self.weights.pad_weight, 1.0)
        return samples.sums(per_token * weight) / samples.sums(weight).clamp(min=1)

    def image_loss(self, v: Tensor, image: NoisyImage, t: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted noise prediction error, and the score entropy over candidates, [B, I] each.

        Both are means over the tokens and numbers of an image, in nats for each number.

        `v` [B, N, C] is the decoder's image head, `t` i64 [B, I].
        """
        z_t = image.input.z_t
        # Conditions and dropped images carry no loss; the limits keep theirs finite.
        abar = image.abar.clamp(1e-6, 1 - 1e-6)
        token_abar = self._by_token(abar)
        a = token_abar.unsqueeze(2)
        eps_hat = a.sqrt() * v + (1 - a).sqrt() * z_t
        # |eps - eps_hat|^2 / abar = |v - v_hat|^2: without the weight almost nothing is learned
        # where abar is small, which is where the condition shapes an image.
        v_true = a.sqrt() * image.eps - (1 - a).sqrt() * image.z_0
        eps_img = 0.5 * self._by_image((v - v_true).square()).mean((2, 3))
        if self.weights.image_weight == "min_snr":  # Hang et al. 2023: min(SNR, gamma) of z_0
            eps_img = eps_img * (MAX_SNR * (1 - abar)).clamp(max=abar)
        elif self.weights.image_weight == "v_capped":
            eps_img = eps_img * (CAP * abar).clamp(max=1.0)
        if not self.weights.se_image:
            se_img = torch.zeros_like(eps_img)
        elif self.weights.image_candidates == "noises":
            per_number = noise_cross_entropy(image.eps, eps_hat, self.weights.se_noises)
            se_img = self._by_image(per_number).mean((2, 3))
        else:
            se_img = self._by_image(self._latent_score_entropy(image, t, token_abar, eps_hat))
            se_img = se_img.mean(2)
        return eps_img, se_img

    def _latent_score_entropy(
        self, image: NoisyImage, t: Tensor, abar: Tensor, eps_hat: Tensor
    ) -> Tensor:
        """Eq. 4 over other samples' latents and states of the own trajectory, [B, N]."""
        z_t, others = image.input.z_t, _others(image.z_0, self.weights.se_in_batch)
        candidates = torch.cat([image.z_0.unsqueeze(2), self._trajectory(image, t), others], 2)
        log_s = log_score_ratio(energy(z_t, candidates, abar, eps_hat))
        if self.weights.target == "theorem1":
            return score_entropy(log_s, log_score_ratio(log_ratio(z_t, candidates, abar)))
        return -log_s[..., 0]  # Eq. 4 with a one-hot target is the cross-entropy

    def _noise_text(
        self,
        batch: Batch,
        draws: noise.Draws,
        levels: Levels,
        samples: Samples,
        rows: Rows | None,
    ) -> NoisyText:
        t = levels.t_txt
        prompt = batch.prompt & samples.spread(t < schedule.STEPS)
        prompt = prompt | _prefix(batch, levels.prefix, samples)
        means, bias = self.vae.vocabulary()
        mean = means[batch.tokens]
        sigma = self.vae.text_sigma(mean)
        s = mean + sigma * draws.text[:, 1]
        rec = samples.mean(_cross_entropy(self.vae.decode_text(s).float(), batch.tokens))
        kl_term = samples.mean(kl(mean, sigma))
        abar = samples.spread(schedule.TEXT.alpha_bar(t))
        z_0 = s.detach()  # no gradient from the diffusion into the encoder
        z_t = schedule.noised(z_0, draws.text[:, 0], abar.unsqueeze(2))
        z_t = torch.where(prompt.unsqueeze(-1), z_0, z_t)
        text = TextInput(z_t, _log_snr(schedule.TEXT, t), prompt, rows=rows)
        return NoisyText(text, abar, batch.tokens, means, bias, rec, kl_term)

    def _noise_image(
        self,
        latents: Tensor,
        image_at: Tensor | None,
        draws: noise.Draws,
        t: Tensor,
        samples: Samples,
    ) -> NoisyImage:
        assert draws.image is not None
        mean, sigma = self.vae.encode_image(latents)
        s = mean + sigma * draws.image[:, 1]
        rec = (self.vae.decode_image(s).float() - latents).square().mean((1, 2))
        if self.training and self.weights.normalize_latents:
            with torch.no_grad():
                self.vae.track(*_global_moments(s, samples))
        z_0 = self.vae.normalize_image(s)
        if self.weights.detach_latents:
            z_0 = z_0.detach()
        eps, abar = draws.image[:, 0], schedule.IMAGE.alpha_bar(t)
        z_t = schedule.noised(z_0, eps, self._by_token(abar).unsqueeze(2))
        image = ImageInput(z_t, _log_snr(schedule.IMAGE, t), image_at)
        rec, kl_term = samples.average(rec), samples.average(kl(mean, sigma).mean(1))
        return NoisyImage(image, z_0, eps, abar, rec, kl_term)

    def _trajectory(self, image: NoisyImage, t: Tensor) -> Tensor:
        """States of each token's noisy path at evenly spaced earlier steps, [B, N, K, C]."""
        k = self.weights.se_trajectory
        earlier = (t.unsqueeze(2) * torch.arange(1, k + 1, device=t.device)) // (k + 1)
        a = self._by_token(schedule.IMAGE.alpha_bar(earlier)).unsqueeze(3)
        return schedule.noised(image.z_0.unsqueeze(2), image.eps.unsqueeze(2), a)

    def _by_token(self, by_image: Tensor) -> Tensor:
        """[B, I, ...] -> [B, N, ...]: an image's value for each of its tokens."""
        return by_image.repeat_interleave(self.grid, 1)

    def _by_image(self, by_token: Tensor) -> Tensor:
        """[B, N, ...] -> [B, I, tokens of an image, ...]."""
        images = by_token.shape[1] // self.grid
        return by_token.view(len(by_token), images, self.grid, *by_token.shape[2:])


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """The cross-entropy of tokens [R, M] under logits [R, M, V], [R, M].

    Each token's V logits are contiguous: with V as the second of three axes it takes five times as
    long on a CPU.
    """
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def _samples(batch: Batch) -> Samples:
    return Samples(batch.text_of, len(batch), batch.average_over)


def _prefix(batch: Batch, share: Tensor, samples: Samples) -> Tensor:
    """The beginnings of texts after their prompts, `share` [B] of their tokens, bool [R, M].

    A share below 1 leaves at least the last token of a text to predict.
    """
    reply = (~batch.prompt & (batch.tokens != PAD) & (samples.spread(share) > 0)).long()
    given = (share * samples.sums(reply)).long()
    return (reply > 0) & (samples.sums_before(reply) < samples.spread(given))


def _log_snr(table: schedule.Schedule, t: Tensor) -> Tensor:
    return table.log_snr(t).clamp(DROPPED, CLEAN)


def _others(z_0: Tensor, k: int) -> Tensor:
    """Up to k other latents of the global batch at the same place in the image, [B, N, K, C].

    The pool is the global batch in its own order, so candidates do not depend on how many ranks
    share it.
    """
    b = len(z_0)
    z_0 = z_0.detach()
    pool, first = z_0, 0
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        parts = [torch.empty_like(z_0) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, z_0.contiguous())
        pool, first = torch.cat(parts), torch.distributed.get_rank() * b
    k = min(k, len(pool) - 1)
    sample = first + torch.arange(b, device=z_0.device)
    index = (sample.unsqueeze(1) + torch.arange(1, k + 1, device=z_0.device)) % len(pool)
    return pool[index].transpose(1, 2)


def _global_moments(s: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of latents [B, N, C] over the global batch."""
    sums = torch.stack([samples.average(power.mean(1)) for power in (s, s.square())])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(sums)
        sums /= torch.distributed.get_world_size()
    return sums[0], sums[1] - sums[0].square()
