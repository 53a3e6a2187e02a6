"""What a model has learnt of a small captioned set: both directions, both at once, and how wide.

Shapes: n images, 64 feature dimensions of an independent classifier.
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
        self, texts: Sequence[str], *, guidance: float, steps: int, seed: int, solver: str
    ) -> Tensor:
        """Pixels f32 [B, 3, H, W] in [0, 1]."""
        ...

    def image_to_text(
        self, latents: Tensor, *, guidance: float, steps: int, seed: int, solver: str
    ) -> list[str]:
        """A caption for each of `latents` f32 [B, N, C]."""
        ...

    def joint(
        self, n: int, *, guidance: float, steps: int, seed: int, solver: str
    ) -> tuple[Tensor, list[str]]:
        """Images and captions, drawn together."""
        ...


@dataclass(frozen=True)
class Task:
    """The set: held-out images as pixels, tokens and classes, as many training images."""

    names: ClassNames
    real: Tensor  # held out, f32 [n, 3, H, W]
    other: Tensor  # training images, f32 [n, 3, H, W]: another real sample of the same size
    latents: Tensor  # of `real`, f32 [n, N, C]
    labels: Tensor  # of `real`, i64 [n]
    captions: Callable[[Sequence[int]], list[str]]  # a caption for each class


@dataclass(frozen=True)
class Drawn:
    """What was drawn, for people to look at."""

    images: Tensor  # from captions
    captions: list[str]  # that they were drawn from
    seen: list[int]  # what the classifier takes them for
    described: list[str]  # captions of the held-out images
    joint_images: Tensor
    joint_captions: list[str]
    joint_seen: list[int]


class Ruler:
    """Measures images against the held-out ones, all in features of one classifier."""

    def __init__(self, judge: Classifier, task: Task) -> None:
        self.judge, self.task, self.classes = judge, task, len(task.names)
        self.seen, reference = judge.judge(task.real)
        self.unit = float(np.sqrt(np.mean(reference**2)))
        self.reference = reference / self.unit
        self.wanted = torch.arange(len(task.labels)) % self.classes
        self.texts = task.captions(self.wanted.tolist())

    def measure(self, images: Tensor) -> tuple[dict[str, Any], image.Labels]:
        """Numbers of as many images as are held out, drawn from `texts`; their classes."""
        seen, features = self.judge.judge(images)
        features = features / self.unit
        precision, recall = image.precision_recall(self.reference, features)
        shares = image.class_shares(seen, self.classes) * self.classes
        return {
            "t2i_accuracy": image.agreement(seen, self.wanted.numpy()),
            "precision": precision,
            "recall": recall,
            "fid64": image.frechet_distance(self.reference, features),
            "class_shares": [round(float(s), 3) for s in shares],
        }, seen

    def floor(self) -> dict[str, float]:
        """The same of other real images."""
        features = self.judge.judge(self.task.other)[1] / self.unit
        precision, recall = image.precision_recall(self.reference, features)
        return {
            "classifier_accuracy": image.agreement(self.seen, self.task.labels.numpy()),
            "precision_floor": precision,
            "recall_floor": recall,
            "fid64_floor": image.frechet_distance(self.reference, features),
        }


def evaluate(
    generator: Generates,
    ruler: Ruler,
    *,
    guidance: float,
    joint_guidance: float,
    steps: int,
    solver: str,
    text_solver: str,
    seed: int = 0,
) -> tuple[dict[str, Any], Drawn]:
    """Numbers beside their floors, and the images and texts behind them.

    Images are asked for by caption, as many of each class as are held out; every distance is
    between equally many images. `text_solver` draws captions, alone and with their images.
    """
    task, wanted, texts = ruler.task, ruler.wanted.numpy(), ruler.texts
    images = generator.text_to_image(
        texts, guidance=guidance, steps=steps, seed=seed, solver=solver
    )
    metrics, seen = ruler.measure(images)
    free = generator.text_to_image(texts, guidance=0.0, steps=steps, seed=seed, solver=solver)
    metrics |= {f"{name}_unguided": value for name, value in ruler.measure(free)[0].items()}
    described = generator.image_to_text(
        task.latents, guidance=0.0, steps=2 * steps, seed=seed, solver=text_solver
    )
    n = len(task.labels)
    joint_images, joint_captions = generator.joint(
        n, guidance=joint_guidance, steps=2 * steps, seed=seed, solver=text_solver
    )
    joint_seen = ruler.judge.judge(joint_images)[0]
    named = np.array([task.names.named(text) for text in joint_captions])
    joint_shares = image.class_shares(joint_seen, ruler.classes) * ruler.classes
    metrics |= ruler.floor() | {
        "shuffled_control": image.shuffled_control(seen, wanted, seed=seed),
        "i2t_accuracy": caption_accuracy(task.names, described, task.labels.tolist())[0],
        "joint_agreement": image.agreement(named, joint_seen),
        "joint_class_shares": [round(float(s), 3) for s in joint_shares],
        "n": n,
    }
    drawn = Drawn(
        images,
        texts,
        seen.tolist(),
        described,
        joint_images,
        joint_captions,
        joint_seen.tolist(),
    )
    return metrics, drawn
