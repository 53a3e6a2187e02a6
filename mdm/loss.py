"""The training objective (Eq. 18): noise both modalities at their own levels, score the prediction.

Shapes: b batch, p pictures a sample, n image tokens of all of them, m text tokens, c latent width,
v vocabulary, k candidates.

What is a condition is a matter of noise levels alone: t = 0 is given, t = T is dropped. A text's
prompt and all pictures but the last are given wherever anything is:

    class -> image              text dropped, class kept
    text -> image               text given; former pictures of a dialogue too
    image -> text               picture given, text noised
    question + image -> answer  the same, with the question as the text's prompt
    text -> text                no picture, the former turns as prompt
    both at once                both noised, each at its own level
"""

from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.config import Config
from mdm.data.batch import Batch
from mdm.diffusion import noise, schedule
from mdm.diffusion.score_entropy import (
    energy,
    log_ratio,
    log_ratio_vocabulary,
    log_score_ratio,
    score_entropy,
)
from mdm.diffusion.time_warp import TimeWarp
from mdm.first_stage.tokenizer import PAD
from mdm.model.decoder import Network
from mdm.model.embedding import CLEAN, DROPPED
from mdm.model.packing import Texts
from mdm.model.vae import NoisyLatentVAE, kl

MIN_ALPHA_BAR = 0.05  # caps the weight of almost pure noise


CONDITIONINGS = (
    "class_to_image",
    "image",  # nothing given
    "text_to_image",
    "image_to_text",
    "answer",  # to a question about a picture
    "text_alone",  # with or without a prompt
    "both",
)
_KINDS = ("text_to_image", "image_to_text", "image", "text_alone", "both")  # as they are drawn
CONDITIONED_TERMS = ("samples", "eps_img", "se_img", "se_txt")


class LossTerms(NamedTuple):
    """Scalars in fp32; a term of a modality that the batch lacks is 0."""

    total: Tensor
    rec_img: Tensor  # Eq. 15
    rec_txt: Tensor  # Eq. 16
    kl: Tensor  # Eq. 18, without its weight
    eps_img: Tensor  # 1/2 |eps - eps_hat|^2 / abar, a mean over a token's numbers
    se_img: Tensor  # score entropy over image candidates
    se_txt: Tensor  # score entropy over the vocabulary
    # [CONDITIONINGS, CONDITIONED_TERMS] sums over the samples of each conditioning, for metrics
    by_conditioning: Tensor


class Levels(NamedTuple):
    """Noise levels of a batch."""

    t_img: Tensor  # i64 [b, p], 0 ... T
    t_txt: Tensor  # i64 [b]
    class_ids: Tensor  # i64 [b], -1 where dropped
    conditioning: Tensor  # i64 [b], index into CONDITIONINGS


class Objective(nn.Module):
    """Network, VAE and loss; all randomness comes from (seed, sample, epoch)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.seed, self.weights, self.model = config.seed, config.objective, config.model
        self.network = Network(config.model)
        self.network.trunk.checkpointing = config.train.activation_checkpointing
        self.vae = NoisyLatentVAE(config.model.latent_dim, config.model.vocab_size)
        self.text_warp = TimeWarp(config.model.vocab_size) if self.weights.text_warp else None

    def forward(self, batch: Batch, step: int) -> LossTerms:
        """Loss terms of one rank's share of a global step.

        Raises:
            ValueError: a batch that does not fit the model, with both values.
        """
        batch.check(self.model)
        n = 0 if batch.latents is None else batch.latents.shape[1]
        draws = noise.draw(
            self.seed,
            batch.keys,
            batch.epochs,
            n,
            batch.tokens.shape[1],
            self.model.latent_dim,
            batch.text_of,
        )
        levels = self.draw_levels(draws.uniforms, batch)
        texts = Texts(batch.text_of, len(batch), batch.average_over)
        prompt = batch.prompt & texts.spread(levels.t_txt < schedule.STEPS)
        means, bias = self.vae.vocabulary()

        # Text: z_0 around mu_v, without a gradient from the diffusion into the encoder.
        mean_txt = means[batch.tokens]
        sigma_txt = self.vae.text_sigma(mean_txt)
        s_txt = mean_txt + sigma_txt * draws.text[:, 1]
        rec_txt = texts.mean(_cross_entropy(self.vae.decode_text(s_txt).float(), batch.tokens))
        kl_term = texts.mean(kl(mean_txt, sigma_txt))
        abar_txt = texts.spread(schedule.TEXT.alpha_bar(levels.t_txt))
        z_0_txt = s_txt.detach()
        z_txt = schedule.noised(z_0_txt, draws.text[:, 0], abar_txt.unsqueeze(2))
        z_txt = torch.where(prompt.unsqueeze(-1), z_0_txt, z_txt)

        image = self._image_latents(batch, draws) if batch.latents is not None else None
        abar_img = schedule.IMAGE.alpha_bar(levels.t_img)
        z_img = level_img = None
        if image is not None:
            z_img = schedule.noised(image.z_0, image.eps, self._by_token(abar_img).unsqueeze(2))
            level_img = _level(schedule.IMAGE, levels.t_img)
        level_txt = _level(schedule.TEXT, levels.t_txt)

        estimate = None
        if _self_conditions(step, self.weights.p_self_condition):
            with torch.no_grad():
                first = self.network(
                    *(z_txt, level_txt, prompt, levels.class_ids, z_img, level_img),
                    picture_at=batch.picture_at,
                    text_of=batch.text_of,
                )
                estimate = (first.text.float() @ means.T + bias).softmax(-1) @ means
        said = self.network(
            *(z_txt, level_txt, prompt, levels.class_ids, z_img, level_img),
            estimate_txt=estimate,
            picture_at=batch.picture_at,
            text_of=batch.text_of,
        )

        logits = said.text.float() @ means.T + bias
        text_losses = self._text_losses(logits, batch.tokens, prompt, z_txt, abar_txt, means, texts)
        text_losses = text_losses * _noisy(levels.t_txt)
        if self.text_warp is not None and self.training:
            self.text_warp.update(levels.t_txt, text_losses, schedule.STEPS)
        rec_img = logits.new_zeros(())
        image_losses = logits.new_zeros(2, len(batch))
        if image is not None and said.image is not None and z_img is not None:
            rec_img, kl_img = image.rec, image.kl
            kl_term = kl_term + kl_img
            image_losses = self._image_losses(
                said.image.float(), image, z_img, abar_img, levels.t_img
            )
        # Means over all samples, not over the noisy ones: ranks then average to the global loss.
        eps_img, se_img = image_losses.mean(1)
        se_txt = texts.average(text_losses)
        w = self.weights
        total = (
            rec_img
            + rec_txt
            + w.beta_kl * kl_term
            + w.lambda_se * (w.eps_image * eps_img + w.se_image * se_img + se_txt)
        )
        losses = torch.stack([*image_losses, text_losses], 1).detach()
        return LossTerms(
            *(total, rec_img, rec_txt, kl_term, eps_img, se_img, se_txt),
            _by_conditioning(levels.conditioning, losses),
        )

    def draw_levels(self, uniforms: Tensor, batch: Batch) -> Levels:
        """Noise levels and kept classes from uniforms [b, 8]."""
        w, last = self.weights, schedule.STEPS
        task, u_img, u_txt, u_class = uniforms[:, :4].unbind(1)
        t_img = 1 + (u_img * (last - 1)).long()
        t_txt = 1 + (u_txt * (last - 1)).long()
        if self.text_warp is not None:
            t_txt = self.text_warp.steps(u_txt, last)
        if batch.latents is None:
            alone = torch.full_like(batch.class_ids, CONDITIONINGS.index("text_alone"))
            return Levels(t_img.unsqueeze(1), t_txt, torch.full_like(batch.class_ids, -1), alone)
        edges = torch.tensor([w.p_text_to_image, w.p_image_to_text, w.p_image, w.p_text])
        kind = torch.bucketize(task.contiguous(), edges.cumsum(0).to(task.device), right=True)
        t_txt = torch.where(kind == 0, 0, torch.where(kind == 2, last, t_txt))
        # A picture that is always given clean is learnt by heart where pictures are few.
        given = (u_img * (w.condition_noise * last)).long()
        t_img = torch.where(kind == 1, given, torch.where(kind == 3, last, t_img))
        keep = (kind == 2) & (u_class < w.p_class)
        former = torch.where((kind == 2) | (kind == 3), last, 0).unsqueeze(1)
        former = former.expand(-1, batch.latents.shape[1] // self._grid - 1)
        t_img = torch.cat([former, t_img.unsqueeze(1)], 1)
        class_ids = torch.where(keep, batch.class_ids, -1)
        conditioning = torch.tensor([CONDITIONINGS.index(name) for name in _KINDS]).to(kind.device)
        conditioning = conditioning[kind]
        labelled, asked = (kind == 2) & (class_ids >= 0), (kind == 1) & batch.prompt.any(1)
        conditioning[labelled] = CONDITIONINGS.index("class_to_image")
        conditioning[asked] = CONDITIONINGS.index("answer")
        return Levels(t_img, t_txt, class_ids, conditioning)

    @property
    def _grid(self) -> int:
        return self.model.image_height * self.model.image_width

    def _by_token(self, by_picture: Tensor) -> Tensor:
        """[b, p, ...] -> [b, n, ...]: a picture's value for each of its tokens."""
        return by_picture.repeat_interleave(self._grid, 1)

    def _by_picture(self, by_token: Tensor) -> Tensor:
        """[b, n, ...] -> [b, p, tokens of a picture, ...]."""
        return by_token.view(len(by_token), -1, self._grid, *by_token.shape[2:])

    def _image_latents(self, batch: Batch, draws: noise.Draws) -> "_ImageLatents":
        assert batch.latents is not None
        assert draws.image is not None
        mean, sigma = self.vae.encode_image(batch.latents)
        s = mean + sigma * draws.image[:, 1]
        rec = (self.vae.decode_image(s).float() - batch.latents).square().mean()
        if self.training and self.weights.normalize_latents:
            with torch.no_grad():
                self.vae.track(*_global_moments(s))
        z_0 = self.vae.normalize_image(s)
        if self.weights.detach_latents:
            z_0 = z_0.detach()
        return _ImageLatents(z_0, draws.image[:, 0], rec, kl(mean, sigma).mean())

    def _image_losses(
        self, v: Tensor, image: "_ImageLatents", z_t: Tensor, abar: Tensor, t: Tensor
    ) -> Tensor:
        """[2, b]: the weighted noise prediction error, and the score entropy over candidates."""
        noisy = _noisy(t)
        abar = abar.clamp(1e-6, 1 - 1e-6)  # conditions and drops carry no loss, only no NaN either
        token_abar = self._by_token(abar)
        a = token_abar.unsqueeze(2)
        eps_hat = a.sqrt() * v + (1 - a).sqrt() * z_t
        # 1/2 |eps - eps_hat|^2 / abar = 1/2 |v - v_hat|^2: without the weight almost nothing is
        # learned where abar is small, and there a picture takes the shape that was asked for.
        weight = 1 / abar.clamp(min=MIN_ALPHA_BAR)
        eps_img = weight * 0.5 * self._by_picture((eps_hat - image.eps).square()).mean((2, 3))
        candidates = torch.cat(
            [
                image.z_0.unsqueeze(2),
                self._trajectory(image, t),
                _others(image.z_0, self.weights.se_in_batch),
            ],
            2,
        )
        log_s = log_score_ratio(energy(z_t, candidates, token_abar, eps_hat))
        if self.weights.target == "theorem1":
            log_r = log_score_ratio(log_ratio(z_t, candidates, token_abar))
            se_img = self._by_picture(score_entropy(log_s, log_r)).mean(2)
        else:  # Eq. 4 with a one-hot target is the cross-entropy
            se_img = -self._by_picture(log_s[..., 0]).mean(2)
        return torch.stack([(eps_img * noisy).sum(1), (se_img * noisy).sum(1)])

    def _trajectory(self, image: "_ImageLatents", t: Tensor) -> Tensor:
        """States of each token's own path at evenly spaced earlier steps, [b, n, k, c]."""
        k = self.weights.se_trajectory
        earlier = (t.unsqueeze(2) * torch.arange(1, k + 1, device=t.device)) // (k + 1)
        a = self._by_token(schedule.IMAGE.alpha_bar(earlier)).unsqueeze(3)
        return schedule.noised(image.z_0.unsqueeze(2), image.eps.unsqueeze(2), a)

    def _text_losses(
        self,
        logits: Tensor,
        tokens: Tensor,
        prompt: Tensor,
        z_t: Tensor,
        abar: Tensor,
        means: Tensor,
        texts: Texts,
    ) -> Tensor:
        """Score entropy over the whole vocabulary, a mean over what is not prompt, [b]."""
        if self.weights.target == "theorem1":
            with torch.no_grad():  # of z_t and the vocabulary alone: nothing tells it the context
                token_abar = abar.clamp(max=1 - 1e-6).expand(tokens.shape)
                log_r = log_score_ratio(log_ratio_vocabulary(z_t, means, token_abar))
            per_token = score_entropy(log_score_ratio(logits), log_r)
        else:  # with a one-hot target: cross-entropy
            per_token = _cross_entropy(logits, tokens)
        weight = ~prompt * torch.where(tokens == PAD, self.weights.pad_weight, 1.0)
        return texts.sums(per_token * weight) / texts.sums(weight).clamp(min=1)


class _ImageLatents(NamedTuple):
    z_0: Tensor  # [b, n, c], normalised, detached
    eps: Tensor  # [b, n, c]
    rec: Tensor
    kl: Tensor


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each of tokens [b, m] under logits [b, m, v], [b, m].

    Rows of v numbers that lie together: with v as the second of three axes it takes five times as
    long on a CPU.
    """
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def _noisy(t: Tensor) -> Tensor:
    """1 where a step carries a loss: neither given nor dropped."""
    return ((t > 0) & (t < schedule.STEPS)).float()


def _by_conditioning(conditioning: Tensor, losses: Tensor) -> Tensor:
    """Sums of [1, losses [b, terms]] over the samples of each conditioning."""
    rows = torch.cat([torch.ones_like(losses[:, :1]), losses], 1).double()
    sums = rows.new_zeros(len(CONDITIONINGS), rows.shape[1])
    return sums.index_add_(0, conditioning, rows)


def _level(table: schedule.Schedule, t: Tensor) -> Tensor:
    return table.log_snr(t).clamp(DROPPED, CLEAN)


def _self_conditions(step: int, share: float) -> bool:
    """Whether this global step makes an estimate first: the same answer on every rank."""
    return int((step + 1) * share) > int(step * share)


def _others(z_0: Tensor, k: int) -> Tensor:
    """Up to k other latents of the global batch at the same place in the picture, [b, n, k, c].

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
    own = first + torch.arange(b, device=z_0.device)
    index = (own.unsqueeze(1) + torch.arange(1, k + 1, device=z_0.device)) % len(pool)
    return pool[index].transpose(1, 2)


def _global_moments(s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [c] over the global batch."""
    sums = torch.stack([s.mean((0, 1)), s.square().mean((0, 1))])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(sums)
        sums /= torch.distributed.get_world_size()
    return sums[0], sums[1] - sums[0].square()
