"""Evaluates a model of a small captioned set: caption to image, image to caption, both at once.

Shapes: n images, 64 feature dimensions of an independent classifier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdm.config import doc
from mdm.diffusion.sampler import SOLVERS
from mdm.evaluate import image
from mdm.evaluate.caption import ClassNames, caption_accuracy
from mdm.evaluate.classifier import Classifier
from mdm.evaluate.suite import Label
from mdm.generate import Generator

DRAWS = 3  # captions of each held-out image, and as many pairs: they differ most between seeds


@dataclass(frozen=True)
class Sampling:
    """How images and captions are generated."""

    guidance: float = doc(0.15, "guidance weight of images")
    text_guidance: float = doc(1.0, "guidance weight of captions and replies")
    joint_guidance: float = doc(1.0, "guidance weight of images and captions drawn together")
    steps: int = doc(20, "solver steps of images")
    joint_steps: int = doc(100, "solver steps of images and captions drawn together")
    solver: str = doc("dpmpp2m", f"of images: one of {', '.join(SOLVERS)}")
    text_solver: str = doc("ddpm", "of captions, and of images drawn with their captions")


@dataclass
class Ruler:
    """Measures images against the held-out ones, all in features of one classifier."""

    judge: Classifier
    names: ClassNames
    real: Tensor  # held out, f32 [n, 3, H, W]
    other: Tensor  # training images, f32 [n, 3, H, W]: another real sample of the same size
    latents: Tensor  # of `real`, f32 [n, N, C]
    labels: Tensor  # of `real`, i64 [n]
    captions: Callable[[Sequence[int]], list[str]]  # a caption for each class

    def __post_init__(self) -> None:
        self.classes = len(self.names)
        self.seen, reference = self.judge.judge(self.real)
        self.unit = float(np.sqrt(np.mean(reference**2)))
        self.reference = reference / self.unit
        self.wanted = torch.arange(len(self.labels)) % self.classes
        self.prompts = self.captions(self.wanted.tolist())

    def measure(self, images: Tensor) -> tuple[dict[str, Any], image.Labels]:
        """Metrics of n images generated from `prompts`, and the classes seen in them."""
        seen, features = self.judge.judge(images)
        return {
            "t2i_accuracy": image.agreement(seen, self.wanted.numpy()),
            **self._distances(features, ""),
            "class_shares": self.class_shares(seen),
        }, seen

    def floor(self) -> dict[str, float]:
        """The same metrics of other real images."""
        return {
            "classifier_accuracy": image.agreement(self.seen, self.labels.numpy()),
            **self._distances(self.judge.judge(self.other)[1], "_floor"),
        }

    def class_shares(self, seen: image.Labels) -> list[float]:
        """Share of each class among `seen`, over an even share."""
        shares = image.class_shares(seen, self.classes) * self.classes
        return [round(float(share), 3) for share in shares]

    def _distances(self, features: image.Features, suffix: str) -> dict[str, float]:
        features = features / self.unit
        precision, recall = image.precision_recall(self.reference, features)
        return {
            f"precision{suffix}": precision,
            f"recall{suffix}": recall,
            f"fid64{suffix}": image.frechet_distance(self.reference, features),
        }


def evaluate(
    generator: Generator,
    ruler: Ruler,
    sampling: Sampling,
    seed: int = 0,
    draws: int = DRAWS,
    guidances: Sequence[float] = (),
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, list[Label]]]:
    """Evaluate `generator` on the task of `ruler`.

    As many images of each class are generated as are held out, so that every distance is between
    equally many images; `draws` times as many captions and pairs. Of several `guidances`, in place
    of the one of `sampling`, the one counts whose images are nearest to the real ones. Returns the
    metrics with their floors, images f32 [n, 3, H, W] by name, and the labels of the images.
    """
    wanted, names = ruler.wanted.numpy(), ruler.names
    image_options: dict[str, Any] = {"steps": sampling.steps, "solver": sampling.solver}
    text: dict[str, Any] = {"solver": sampling.text_solver}
    guidances = guidances or (sampling.guidance,)
    by_weight = {}
    for weight in {0.0, *guidances}:
        drawn = generator.text_to_image(ruler.prompts, guidance=weight, seed=seed, **image_options)
        by_weight[weight] = (*ruler.measure(drawn), drawn)
    unguided = {f"{name}_unguided": value for name, value in by_weight[0.0][0].items()}
    guidance = min(guidances, key=lambda weight: float(by_weight[weight][0]["fid64"]))
    metrics, seen, drawn = by_weight[guidance]
    metrics |= unguided
    n, classes = len(ruler.labels), draws * ruler.labels.tolist()
    captions = generator.image_to_text(
        ruler.latents.repeat(draws, 1, 1), guidance=sampling.text_guidance, seed=seed, **text
    )
    pairs = len(captions)
    text["steps"] = sampling.joint_steps
    joint, joint_captions = generator.joint(
        pairs, guidance=sampling.joint_guidance, seed=seed, **text
    )
    joint_seen = ruler.judge.judge(joint)[0]
    named = np.array([names.named(caption) for caption in joint_captions])
    metrics |= ruler.floor() | {
        "shuffled_control": image.shuffled_control(seen, wanted, seed=seed),
        "i2t_accuracy": caption_accuracy(names, captions, classes)[0],
        "joint_agreement": image.agreement(named, joint_seen),
        "joint_class_shares": ruler.class_shares(joint_seen),
        "guidance": guidance,
        "n": n,
        "joint_n": pairs,
    }
    labels = {
        "drawn": map(Label, ruler.prompts, [""] * n, (seen == wanted).tolist()),
        "described": [
            Label(caption, names.names[c][0], names.named(caption) == c)
            for caption, c in zip(captions[:n], classes[:n], strict=True)
        ],
        "joint": map(Label, joint_captions, [""] * pairs, (named == joint_seen).tolist()),
    }
    images = {"drawn": drawn, "described": ruler.real, "joint": joint, "real": ruler.real}
    return metrics, images, {name: list(row) for name, row in labels.items()}
