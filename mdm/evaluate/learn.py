"""What a model has learnt of a small captioned set: both directions, both at once, and how wide.

Shapes: n pictures, 64 feature dimensions of an independent classifier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mdm.evaluate import image
from mdm.evaluate.caption import ClassNames, caption_accuracy
from mdm.evaluate.classifier import Classifier


class Generates(Protocol):
    """What is asked of a generator; results are a function of the arguments alone."""

    def text_to_image(
        self, texts: Sequence[str], *, guidance: float, steps: int, seed: int
    ) -> Tensor:
        """Pixels f32 [B, 3, H, W] in [0, 1]."""
        ...

    def image_to_text(
        self, latents: Tensor, *, guidance: float, steps: int, seed: int
    ) -> list[str]:
        """A caption for each of `latents` f32 [B, N, C]."""
        ...

    def joint(self, n: int, *, guidance: float, steps: int, seed: int) -> tuple[Tensor, list[str]]:
        """Pictures and captions, drawn together."""
        ...


@dataclass(frozen=True)
class Task:
    """The set: held-out pictures as pixels, tokens and classes, as many training pictures."""

    names: ClassNames
    real: Tensor  # held out, f32 [n, 3, H, W]
    other: Tensor  # training pictures, f32 [n, 3, H, W]: another real sample of the same size
    latents: Tensor  # of `real`, f32 [n, N, C]
    labels: Tensor  # of `real`, i64 [n]
    captions: Callable[[Sequence[int]], list[str]]  # a caption for each class


@dataclass(frozen=True)
class Drawn:
    """What was drawn, for people to look at."""

    pictures: Tensor  # from captions
    captions: list[str]  # that they were drawn from
    seen: list[int]  # what the classifier takes them for
    described: list[str]  # captions of the held-out pictures
    joint_pictures: Tensor
    joint_captions: list[str]
    joint_seen: list[int]


def evaluate(
    generator: Generates,
    judge: Classifier,
    task: Task,
    *,
    guidance: float,
    joint_guidance: float,
    steps: int,
    seed: int = 0,
) -> tuple[dict[str, Any], Drawn]:
    """Numbers beside their floors, and the pictures and texts behind them.

    Pictures are asked for by caption, as many of each class as are held out; every distance is
    between equally many pictures.
    """
    classes = len(task.names)
    wanted = torch.arange(len(task.labels)) % classes
    texts = task.captions(wanted.tolist())

    real_seen, reference = judge.judge(task.real)
    unit = float(np.sqrt(np.mean(reference**2)))
    reference = reference / unit
    floor = judge.judge(task.other)[1] / unit

    def measured(name: str, weight: float) -> tuple[dict[str, Any], Tensor, image.Labels]:
        pictures = generator.text_to_image(texts, guidance=weight, steps=steps, seed=seed)
        seen, features = judge.judge(pictures)
        features = features / unit
        precision, recall = image.precision_recall(reference, features)
        shares = image.class_shares(seen, classes) * classes
        return (
            {
                f"t2i_accuracy{name}": image.agreement(seen, wanted.numpy()),
                f"precision{name}": precision,
                f"recall{name}": recall,
                f"fid64{name}": image.frechet_distance(reference, features),
                f"class_shares{name}": [round(float(s), 3) for s in shares],
            },
            pictures,
            seen,
        )

    metrics, pictures, seen = measured("", guidance)
    metrics |= measured("_unguided", 0.0)[0]
    described = generator.image_to_text(task.latents, guidance=0.0, steps=steps, seed=seed)
    n = len(task.labels)
    joint_pictures, joint_captions = generator.joint(
        n, guidance=joint_guidance, steps=2 * steps, seed=seed
    )
    joint_seen = judge.judge(joint_pictures)[0]
    named = np.array([task.names.named(text) for text in joint_captions])
    precision, recall = image.precision_recall(reference, floor)
    metrics |= {
        "shuffled_control": image.shuffled_control(seen, wanted.numpy(), seed=seed),
        "i2t_accuracy": caption_accuracy(task.names, described, task.labels.tolist())[0],
        "joint_agreement": image.agreement(named, joint_seen),
        "joint_class_shares": [
            round(float(s), 3) for s in image.class_shares(joint_seen, classes) * classes
        ],
        "classifier_accuracy": image.agreement(real_seen, task.labels.numpy()),
        "precision_floor": precision,
        "recall_floor": recall,
        "fid64_floor": image.frechet_distance(reference, floor),
        "n": n,
    }
    drawn = Drawn(
        pictures,
        texts,
        seen.tolist(),
        described,
        joint_pictures,
        joint_captions,
        joint_seen.tolist(),
    )
    return metrics, drawn
