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
    conditioning: Tensor  # i64 [B], index into CONDITIONINGS


def draw_levels(
    weights: ObjectiveConfig,
    uniforms: Tensor,
    images: int,
    class_ids: Tensor,
    has_prompt: Tensor,
    text_steps: Callable[[Tensor], Tensor] | None = None,
) -> Levels:
    """Noise levels and kept classes of a batch.

    Args:
        weights: the shares of the conditionings.
        uniforms: [B, 8] in [0, 1).
        images: images a sample; 0 for text alone.
        class_ids: i64 [B], -1 without a class.
        has_prompt: bool [B], whether a sample's text begins with a prompt; unused without images.
        text_steps: maps uniforms [B] to noise steps of texts; evenly over 1 ... T - 1 by default.
    """
    last = schedule.STEPS
    task, u_img, u_txt, u_class = uniforms[:, :4].unbind(1)
    t_img = 1 + (u_img * (last - 1)).long()
    t_txt = text_steps(u_txt) if text_steps else 1 + (u_txt * (last - 1)).long()
    if not images:
        alone = torch.full_like(class_ids, CONDITIONINGS.index("text_alone"))
        return Levels(t_img.unsqueeze(1), t_txt, torch.full_like(class_ids, -1), alone)
    w = weights
    edges = torch.tensor([w.p_text_to_image, w.p_image_to_text, w.p_image, w.p_text]).cumsum(0)
    edges = edges.to(task.device, non_blocking=True)
    kind = torch.bucketize(task.contiguous(), edges, right=True)
    t_txt = torch.where(kind == 0, 0, torch.where(kind == 2, last, t_txt))
    # In small data sets, an image that is always given clean is memorised.
    given = (u_img * (w.condition_noise * last)).long()
    t_img = torch.where(kind == 1, given, torch.where(kind == 3, last, t_img))
    keep = (kind == 2) & (u_class < w.p_class)
    earlier = torch.where((kind == 2) | (kind == 3), last, 0).unsqueeze(1)
    t_img = torch.cat([earlier.expand(-1, images - 1), t_img.unsqueeze(1)], 1)
    class_ids = torch.where(keep, class_ids, -1)
    indices = torch.tensor([CONDITIONINGS.index(name) for name in _KINDS])
    conditioning = indices.to(kind.device, non_blocking=True)[kind]
    conditioning[(kind == 2) & (class_ids >= 0)] = CONDITIONINGS.index("class_to_image")
    conditioning[(kind == 1) & has_prompt] = CONDITIONINGS.index("answer")
    return Levels(t_img, t_txt, class_ids, conditioning)
