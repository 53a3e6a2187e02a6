"""The `demo` suite: every way to generate, scored by an independent classifier.

All generation uses the averaged weights of an exported model. Numbers come back as one flat dict,
images as tensors, and their labels and the replies as plain lists.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mdm.diffusion.sampler import SOLVERS
from mdm.evaluate import image
from mdm.evaluate.caption import ClassNames, caption_accuracy, pair_agreement
from mdm.evaluate.classifier import Classifier
from mdm.evaluate.heldout import Encoded, Images, balanced
from mdm.generate import Generator
from mdm.utils.fields import POSITIVE, check_fields, doc


@dataclass(frozen=True)
class Settings:
    """How many samples are drawn, and how."""

    n: int = doc(500, "images of each kind", POSITIVE)
    solver: str = doc("ddpm", f"one of {', '.join(SOLVERS)}")
    guidance: float = doc(3.0, "guidance weight w of (1 + w) cond - w uncond, images")
    text_guidance: float = doc(1.0, "guidance weight for captions")
    candidates: int = doc(
        1,
        "captions and replies drawn for each image or dialogue; the most typical counts",
        POSITIVE,
    )
    joint_guidance: float = doc(2.0, "guidance weight of images drawn with their captions")
    steps: int = doc(20, "solver steps of an image", POSITIVE)
    joint_steps: int = doc(40, "solver steps of each where both are drawn")
    precision: str = doc("auto", "of matrix products: bf16, fp32, or what this CPU is fast in")
    seed: int = doc(0, "of everything drawn here")

    def __post_init__(self) -> None:
        check_fields(self)

    def options(self, steps: int) -> dict[str, Any]:
        """The arguments that every method of a `Generator` takes."""
        return {"steps": steps, "seed": self.seed, "solver": self.solver}


@dataclass(frozen=True)
class DemoData:
    """What the suite compares with."""

    names: ClassNames
    train: Encoded  # encoded training images of the classes
    heldout: Encoded  # encoded held-out images of the classes
    real: Images  # held-out images of the classes, as published
    decode: Callable[[Tensor], Tensor]  # latents [n, N, C] → pixels [n, 3, H, W]
    prompts: tuple[tuple[str, ...], ...]  # dialogues whose last turn needs a reply


@dataclass(frozen=True)
class Label:
    """The caption of a tile: its text, the target, and whether it is right (None: not judged)."""

    text: str
    truth: str = ""
    right: bool | None = None


@dataclass
class DemoResult:
    """Numbers, images f32 [n, 3, H, W] in [0, 1] by name, and the images' labels, in order."""

    metrics: dict[str, float] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, list[Label]] = field(default_factory=dict)
    replies: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Everything except the images, as JSON values."""
        labels = {name: [asdict(label) for label in row] for name, row in self.labels.items()}
        return {"metrics": self.metrics, "labels": labels, "replies": self.replies}


def run_demo(
    generator: Generator, classifier: Classifier, data: DemoData, settings: Settings
) -> DemoResult:
    """Evaluate `generator`.

    Raises ValueError if the held-out split is too small for the distances.
    """
    suite = _Suite(generator, classifier, data, settings)
    parts = {
        "real images": suite.real_images,
        "class to image": suite.class_to_image,
        "text to image": suite.text_to_image,
        "image to text": suite.image_to_text,
        "image and text": suite.joint,
        "replies": suite.replies,
    }
    with tqdm(parts.items(), desc="evaluate", unit="part") as bar:
        for name, part in bar:
            bar.set_postfix_str(name)
            part()
    return suite.result


class _Suite:
    def __init__(
        self, generator: Generator, classifier: Classifier, data: DemoData, settings: Settings
    ) -> None:
        self.generator, self.classifier = generator, classifier
        self.data, self.settings = data, settings
        self.image_options = settings.options(settings.steps)
        self.text_options: dict[str, Any] = {
            "candidates": settings.candidates,
            "seed": settings.seed,
            "solver": settings.solver,
        }
        self.result = DemoResult()
        self.metrics = self.result.metrics
        self.n_classes = len(data.names)
        self.targets = torch.arange(settings.n) % self.n_classes
        # Every image goes through the decoder once, so that its blur cancels in comparisons.
        self.heldout_pixels = data.decode(data.heldout.latents)
        self.train_pixels = data.decode(data.train.latents)
        reference, floor = data.real.halves()
        self.n_compared = min(settings.n, len(reference), len(floor))
        # Features are divided by their root mean square on training images, a constant of the
        # classifier, so that distances under two classifiers can be compared.
        sample = self.train_pixels[balanced(data.train.class_ids, 1000)]
        self.unit = float(np.sqrt(np.mean(classifier.judge(sample)[1] ** 2)))
        self.reference, self.floor = (
            self._judge(half.pixels[balanced(half.labels, self.n_compared)])[1]
            for half in (reference, floor)
        )

    def _judge(self, pixels: Tensor) -> tuple[image.Labels, image.Features]:
        predicted, features = self.classifier.judge(pixels)
        return predicted, features / self.unit

    def _add_distances(self, name: str, features: image.Features) -> None:
        """FID, KID, precision and recall against the real reference, all at the same n."""
        features = features[: self.n_compared]
        precision, recall = image.precision_recall(self.reference, features)
        kid = image.kernel_distance(self.reference, features, seed=self.settings.seed)
        self.metrics |= {
            name.format("fid64"): image.frechet_distance(self.reference, features),
            name.format("kid"): kid,
            name.format("precision"): precision,
            name.format("recall"): recall,
        }

    def _show(self, name: str, pixels: Tensor, labels: Sequence[Label] = ()) -> None:
        self.result.images[name] = pixels
        if labels:
            self.result.labels[name] = list(labels)

    def _draw(self, texts: Sequence[str]) -> Tensor:
        guidance = self.settings.guidance
        return self.generator.text_to_image(list(texts), guidance=guidance, **self.image_options)

    def _caption(self, latents: Tensor) -> list[str]:
        guidance = self.settings.text_guidance
        return self.generator.image_to_text(latents, guidance=guidance, **self.text_options)

    def real_images(self) -> None:
        """Floors and ceilings: the scores of real images, as published and reconstructed."""
        real, held = self.data.real, self.data.heldout
        again, features = self._judge(self.heldout_pixels)
        seen, _ = self._judge(real.pixels)
        self.metrics |= {
            "classifier_accuracy": image.agreement(seen, real.labels.numpy()),
            "classifier_accuracy_reconstructed": image.agreement(again, held.class_ids.numpy()),
        }
        rows = balanced(held.class_ids, self.n_compared).numpy()
        self._add_distances("{}_floor", self.floor)
        self._add_distances("{}_reconstructed", features[rows])
        self._show("real", real.pixels[balanced(real.labels, 100)])
        self._show("reconstructed", self.heldout_pixels[balanced(held.class_ids, 100)])

    def class_to_image(self) -> None:
        """Agreement, distances, class shares and memorisation, with and without guidance."""
        targets = self.targets.numpy()
        for guidance, name in ((0.0, "{}_unguided"), (self.settings.guidance, "{}")):
            pixels = self.generator.class_to_image(
                self.targets.tolist(), guidance=guidance, **self.image_options
            )
            predicted, features = self._judge(pixels)
            self.metrics[name.format("class2image_accuracy")] = image.agreement(predicted, targets)
            self._add_distances(name, features)
        shares = image.class_shares(predicted, self.n_classes)
        grey = [
            images.mean(1).flatten(1).double().numpy()
            for images in (pixels, self.heldout_pixels, self.train_pixels)
        ]
        self.metrics |= {
            "shuffled_control": image.shuffled_control(predicted, targets, seed=self.settings.seed),
            "class_share_min": float(shares.min()),
            "class_share_max": float(shares.max()),
            "nn_distance_ratio": image.nn_distance_ratio(*grey),
        }
        labels = [
            Label("", self.data.names.names[target][0], bool(class_id == target))
            for class_id, target in zip(predicted[:100], targets[:100], strict=True)
        ]
        self._show("class_to_image", pixels[:100], labels)

    def text_to_image(self) -> None:
        """Agreement of images drawn from class names, every name of every class in turn."""
        names, targets = self.data.names.names, self.targets.tolist()
        texts = [names[c][(i // self.n_classes) % len(names[c])] for i, c in enumerate(targets)]
        pixels = self._draw(texts)
        predicted, _ = self._judge(pixels)
        self.metrics["t2i_accuracy"] = image.agreement(predicted, self.targets.numpy())
        labels = [
            Label(text, "", bool(class_id == target))
            for text, class_id, target in zip(texts[:30], predicted, targets, strict=False)
        ]
        self._show("text_to_image", pixels[:30], labels)

    def image_to_text(self) -> None:
        """Captions of held-out images of the classes."""
        rows = balanced(self.data.heldout.class_ids, self.settings.n)
        held = self.data.heldout.take(rows)
        texts = self._caption(held.latents)
        classes = held.class_ids.tolist()
        named, exact = caption_accuracy(self.data.names, texts, classes)
        self.metrics |= {"i2t_accuracy": named, "i2t_exact": exact}
        labels = [
            Label(text, truth, self.data.names.named(text) == target)
            for text, truth, target in zip(texts, held.texts, classes, strict=True)
        ]
        self._show("captions", self.heldout_pixels[rows[:30]], labels[:30])

    def joint(self) -> None:
        """Images and captions drawn together: does the caption name the class of its image?"""
        names, settings = self.data.names, self.settings
        pixels, texts = self.generator.joint(
            settings.n,
            guidance=settings.joint_guidance,
            text_guidance=settings.text_guidance,
            **settings.options(settings.joint_steps),
        )
        predicted = self._judge(pixels)[0].tolist()
        agreed, counted = pair_agreement(names, texts, predicted)
        self.metrics |= {"joint_agreement": agreed, "joint_class_share": counted}
        labels = []
        for text, class_id in zip(texts[:40], predicted[:40], strict=True):
            is_counted = names.concerns(text) or class_id < self.n_classes
            labels.append(Label(text, "", names.named(text) == class_id if is_counted else None))
        self._show("joint", pixels[:40], labels)

    def replies(self) -> None:
        """Replies to the prompts, for people to read."""
        prompts = list(self.data.prompts)
        texts = self.generator.reply(prompts, **self.text_options) if prompts else []
        self.result.replies = [
            {"turns": list(turns), "reply": text}
            for turns, text in zip(prompts, texts, strict=True)
        ]


def snapshot(
    generator: Generator, classifier: Classifier, texts: Sequence[str], settings: Settings
) -> tuple[Tensor, float]:
    """Two rows of every class and one row of `texts`, drawn from fixed noise.

    The same call on later weights shows what was learnt in between. Also returns the agreement of
    the images of classes, a rough one.
    """
    options = {"guidance": settings.guidance} | settings.options(settings.steps)
    n_classes = classifier.n_classes
    targets = torch.arange(10 * max(1, 50 // n_classes)) % n_classes
    pixels = generator.class_to_image(targets.tolist(), **options)
    accuracy = image.agreement(classifier.judge(pixels)[0], targets.numpy())
    drawn = generator.text_to_image(list(texts[:n_classes]), **options)
    return torch.cat([pixels[: 2 * n_classes], drawn]), accuracy
