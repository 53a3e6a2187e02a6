"""The noise level of each modality of each sample. Noise levels alone express the conditioning.

t = 0 is given, t = T is dropped. A text's prompt and all images but the last are given unless their
modality is dropped:

    class -> image              text dropped, class kept
    text -> image               text given; earlier images of a dialogue too
    image -> text               image given, text noised
    question + image -> answer  the same, with the question as the text's prompt
    text -> text                no image, the earlier turns as prompt
    both at once                both noised, each at its own level

Shapes: B batch, I images a sample.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mdm.config import ObjectiveConfig
from mdm.diffusion import schedule

CONDITIONINGS = (
    "class_to_image",
    "image",  # nothing given
    "text_to_image",
    "image_to_text",
    "answer",  # to a question about an image
    "text_alone",  # with or without a prompt
    "both",
)
_KINDS = ("text_to_image", "image_to_text", "image", "text_alone", "both")  # as they are drawn


class Levels(NamedTuple):
    """Noise levels of a batch."""

    t_img: Tensor  # i64 [B, I], 0 ... T
    t_txt: Tensor  # i64 [B]
    class_ids: Tensor  # i64 [B], -1 where dropped
    scores_img: Tensor  # f32 [B, I], 1 where the image's prediction is scored
    scores_txt: Tensor  # f32 [B], 1 where the text's is
    self_conditions: Tensor  # bool [B], whether the network shall see its estimate of the text
    prefix: Tensor  # f32 [B], share of the text after its prompt that is given too
    conditioning: Tensor  # i64 [B], index into CONDITIONINGS


def self_condition_shares(p: float) -> tuple[float, float]:
    """Shares of the steps that compute estimates, and of their texts that see them: p together.

    An estimate costs a pass of the network for the whole step.
    """
    of_texts = max(0.5, p)
    return p / of_texts, of_texts


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times t / T in [0, 1] -> s t / (1 + (s - 1) t); s = `shift` above 1 favours noise.

    Eq. 23 of Esser et al. 2024.
    """
    return shift * times / (1 + (shift - 1) * times)


def image_times(distribution: str, uniforms: Tensor, shift: float = 1.0) -> Tensor:
    """Times t / T in [0, 1] of images, from uniforms of the same shape.

    Args:
        distribution: `uniform`; `logit_normal`, sigmoid(N(0, 1)) (Esser et al. 2024); or `edm`,
            ln sigma ~ N(-1.2, 1.2^2) (Karras et al. 2022) on the cosine schedule, where
            sigma = tan(pi/2 t/T).
        uniforms: in [0, 1).
        shift: as of `shifted`.
    """
    times = uniforms
    if distribution != "uniform":
        normals = torch.special.ndtri(uniforms.double().clamp(1e-6, 1 - 1e-6))
        if distribution == "logit_normal":
            times = normals.sigmoid()
        else:
            times = (1.2 * normals - 1.2).exp().atan() * 2 / torch.pi
    return shifted(times, shift).to(uniforms.dtype)


def draw_levels(
    weights: ObjectiveConfig,
    uniforms: Tensor,
    images: int,
    class_ids: Tensor,
    asks: Tensor,
    text_steps: Callable[[Tensor], Tensor] | None = None,
) -> Levels:
    """Noise levels and kept classes of a batch.

    Args:
        weights: the shares of the conditionings.
        uniforms: [B, 8] in [0, 1).
        images: images a sample; 0 for text alone.
        class_ids: i64 [B], -1 without a class.
        asks: bool [B], whether a sample's text begins with a question about its last image, which
            is answered, and not drawn from; unused without images.
        text_steps: maps uniforms [B] to noise steps of texts; by default evenly over 1 ... T - 1,
            moved by `weights.text_shift`.
    """
    last = schedule.STEPS
    task, u_img, u_txt, u_class, u_self, u_prefix, length = uniforms[:, :7].unbind(1)
    self_conditions = u_self < self_condition_shares(weights.p_self_condition)[1]
    prefix = torch.where(u_prefix < weights.p_prefix, length, 0.0)
    times = image_times(weights.image_levels, u_img, weights.image_shift)
    t_img = 1 + (times * (last - 1)).long().clamp(0, last - 2)
    if text_steps:
        t_txt = text_steps(u_txt)
    else:
        t_txt = 1 + (shifted(u_txt, weights.text_shift) * (last - 1)).long().clamp(0, last - 2)
    if not images:
        alone = torch.full_like(class_ids, CONDITIONINGS.index("text_alone"))
        none, ones = torch.full_like(class_ids, -1), torch.ones_like(u_txt)
        t_img, scores_img = t_img.unsqueeze(1), torch.zeros_like(ones).unsqueeze(1)
        return Levels(t_img, t_txt, none, scores_img, ones, self_conditions, prefix, alone)
    w = weights
    edges = torch.tensor([w.p_text_to_image, w.p_image_to_text, w.p_image, w.p_text]).cumsum(0)
    edges = edges.to(task.device, non_blocking=True)
    kind = torch.bucketize(task.contiguous(), edges, right=True)
    if w.answer_prompts:  # "is there a red seven? no" is no caption of what shall be drawn
        kind = torch.where(asks & (kind == 0), 1, kind)
    t_txt = torch.where(kind == 0, 0, torch.where(kind == 2, last, t_txt))
    # In small data sets, an image that is always given clean is memorised.
    given = (u_img * (w.condition_noise * last)).long()
    t_img = torch.where(kind == 1, given, torch.where(kind == 3, last, t_img))
    # A class may come with a caption when both are noised: joint samples can begin with one.
    keep = u_class < torch.where(kind == 2, w.p_class, torch.where(kind == 4, w.p_class / 2, 0.0))
    scores_img = ((kind != 1) & (kind != 3)).float()
    scores_txt = ((kind != 0) & (kind != 2)).float()
    earlier = torch.where((kind == 2) | (kind == 3), last, 0).unsqueeze(1)
    t_img = torch.cat([earlier.expand(-1, images - 1), t_img.unsqueeze(1)], 1)
    scores_img = torch.cat(
        [torch.zeros_like(u_img).unsqueeze(1).expand(-1, images - 1), scores_img.unsqueeze(1)], 1
    )
    class_ids = torch.where(keep, class_ids, -1)
    indices = torch.tensor([CONDITIONINGS.index(name) for name in _KINDS])
    conditioning = indices.to(kind.device, non_blocking=True)[kind]
    conditioning[(kind == 2) & (class_ids >= 0)] = CONDITIONINGS.index("class_to_image")
    conditioning[(kind == 1) & asks] = CONDITIONINGS.index("answer")
    prefix = torch.where((kind == 1) | (kind == 3), prefix, 0.0)
    return Levels(
        t_img, t_txt, class_ids, scores_img, scores_txt, self_conditions, prefix, conditioning
    )
