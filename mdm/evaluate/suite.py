"""The `demo` suite: every way to generate, judged by an independent classifier.

All generation runs on the averaged weights of an exported model. Numbers come back as one flat
dict, images as tensors, and their labels and the replies as plain lists.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mdm.config import doc
from mdm.diffusion.sampler import SOLVERS
from mdm.evaluate import image
from mdm.evaluate.caption import ClassNames, caption_accuracy, pair_agreement
from mdm.evaluate.classifier import Classifier
from mdm.evaluate.heldout import Encoded, Images, balanced


class Generates(Protocol):
    """What the suite asks of a generator; results are a function of the arguments alone."""

    def class_to_image(
        self, class_ids: list[int], *, guidance: float, steps: int, seed: int, solver: str
    ) -> Tensor:
        """Pixels f32 [B, 3, H, W] in [0, 1]."""
        ...

    def text_to_image(
        self, texts: list[str], *, guidance: float, steps: int, seed: int, solver: str
    ) -> Tensor:
        """Pixels f32 [B, 3, H, W] in [0, 1]."""
        ...

    def image_to_text(
        self, latents: Tensor, *, guidance: float, steps: int, seed: int, solver: str
    ) -> list[str]:
        """A caption for each of `latents` f32 [B, N, C]."""
        ...

    def reply(
        self, turns: list[tuple[str, ...]], *, steps: int, seed: int, solver: str
    ) -> list[str]:
        """The next turn of each dialogue."""
        ...

    def joint(
        self,
        n: int,
        *,
        guidance: float,
        text_guidance: float,
        steps: int,
        seed: int,
        solver: str,
    ) -> tuple[Tensor, list[str]]:
        """Images and captions, drawn together."""
        ...


@dataclass(frozen=True)
class Settings:
    """How much is drawn, and how."""

    n: int = doc(500, "images of each kind")
    solver: str = doc("ddpm", f"one of {', '.join(SOLVERS)}")
    guidance: float = doc(3.0, "guidance weight w of (1 + w) cond - w uncond, images")
    text_guidance: float = doc(1.0, "guidance weight for captions")
    joint_guidance: float = doc(2.0, "guidance weight of images drawn with their captions")
    steps: int = doc(20, "solver steps of an image")
    text_steps: int = doc(20, "solver steps of a text")
    joint_steps: int = doc(40, "solver steps of each where both are drawn")
    precision: str = doc("auto", "of matrix products: bf16, fp32, or what this CPU is fast in")
    seed: int = doc(0, "of everything drawn here")


@dataclass(frozen=True)
class DemoData:
    """What the suite compares with."""

    names: ClassNames
    train: Encoded  # encoded training images of the classes
    heldout: Encoded  # encoded held-out images of the classes
    real: Images  # held-out images of the classes, as published
    decode: Callable[[Tensor], Tensor]  # latents [n, N, C] → pixels [n, 3, H, W]
    others_heldout: Encoded | None = None  # encoded held-out images of other things
    others_train: Encoded | None = None
    prompts: tuple[tuple[str, ...], ...] = ()  # dialogues, the last turn to be answered


@dataclass(frozen=True)
class Label:
    """What stands under a tile: its text, what was wanted, whether right (None: not judged)."""

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
        """What JSON holds of it: all but the images."""
        labels = {name: [asdict(label) for label in row] for name, row in self.labels.items()}
        return {"metrics": self.metrics, "labels": labels, "replies": self.replies}


def run_demo(
    generator: Generates, judge: Classifier, data: DemoData, settings: Settings
) -> DemoResult:
    """Evaluate `generator`.

    Raises ValueError if the held-out split is too small for the distances.
    """
    suite = _Suite(generator, judge, data, settings)
    parts = {
        "real images": suite.reals,
        "class to image": suite.class_to_image,
        "text to image": suite.text_to_image,
        "image to text": suite.image_to_text,
        "image and text": suite.joint,
        "other images": suite.others,
        "replies": suite.replies,
    }
    with tqdm(parts.items(), desc="evaluate", unit="part") as bar:
        for name, part in bar:
            bar.set_postfix_str(name)
            part()
    return suite.result


class _Suite:
    def __init__(
        self, generator: Generates, judge: Classifier, data: DemoData, how: Settings
    ) -> None:
        self.generator, self.judge, self.data, self.how = generator, judge, data, how
        self.result = DemoResult()
        self.metrics = self.result.metrics
        self.n_classes = len(data.names)
        self.wanted = torch.arange(how.n) % self.n_classes
        # Everything goes through the decoder once, so that its blur cancels where it is compared.
        self.heldout_pixels = data.decode(data.heldout.latents)
        self.train_pixels = data.decode(data.train.latents)
        reference, floor = data.real.halves()
        self.m = min(how.n, len(reference), len(floor))
        # Features are measured in units of their size on training images, a constant of the
        # judge, so that distances of two judges can be compared.
        some = self.train_pixels[balanced(data.train.class_ids, 1000)]
        self.unit = float(np.sqrt(np.mean(judge.judge(some)[1] ** 2)))
        self.reference = self._balanced_features(reference)
        self.floor = self._balanced_features(floor)

    def _balanced_features(self, images: Images) -> image.Features:
        return self._judge(images.pixels[balanced(images.labels, self.m)])[1]

    def _judge(self, pixels: Tensor) -> tuple[image.Labels, image.Features]:
        seen, features = self.judge.judge(pixels)
        return seen, features / self.unit

    def _distances(self, name: str, features: image.Features) -> None:
        """FID, KID, precision, recall against the real reference, all at the same n."""
        precision, recall = image.precision_recall(self.reference, features[: self.m])
        self.metrics |= {
            name.format("fid64"): image.frechet_distance(self.reference, features[: self.m]),
            name.format("kid"): image.kernel_distance(
                self.reference, features[: self.m], seed=self.how.seed
            ),
            name.format("precision"): precision,
            name.format("recall"): recall,
        }

    def _show(self, name: str, pixels: Tensor, labels: Sequence[Label] = ()) -> None:
        self.result.images[name] = pixels
        if labels:
            self.result.labels[name] = list(labels)

    def _draw_texts(self, texts: Sequence[str]) -> Tensor:
        return self.generator.text_to_image(
            list(texts),
            guidance=self.how.guidance,
            steps=self.how.steps,
            seed=self.how.seed,
            solver=self.how.solver,
        )

    def _describe(self, latents: Tensor) -> list[str]:
        return self.generator.image_to_text(
            latents,
            guidance=self.how.text_guidance,
            steps=self.how.text_steps,
            seed=self.how.seed,
            solver=self.how.solver,
        )

    def reals(self) -> None:
        """Floors and ceilings: what real images score, sharp and through the autoencoder."""
        real, held = self.data.real, self.data.heldout
        self.metrics["classifier_accuracy"] = image.agreement(
            self._judge(real.pixels)[0], real.labels.numpy()
        )
        seen, features = self._judge(self.heldout_pixels)
        self.metrics["classifier_accuracy_reconstructed"] = image.agreement(
            seen, held.class_ids.numpy()
        )
        self._distances("{}_floor", self.floor)
        self._distances("{}_reconstructed", features[balanced(held.class_ids, self.m).numpy()])
        self._show("real", real.pixels[balanced(real.labels, 100)])
        self._show("reconstructed", self.heldout_pixels[balanced(held.class_ids, 100)])

    def class_to_image(self) -> None:
        """Agreement, distances, shares, memorisation, with and without guidance."""
        wanted = self.wanted.numpy()
        for guidance, name in ((0.0, "{}_unguided"), (self.how.guidance, "{}")):
            pixels = self.generator.class_to_image(
                self.wanted.tolist(),
                guidance=guidance,
                steps=self.how.steps,
                seed=self.how.seed,
                solver=self.how.solver,
            )
            seen, features = self._judge(pixels)
            self.metrics[name.format("class2image_accuracy")] = image.agreement(seen, wanted)
            self._distances(name, features)
        shares = image.class_shares(seen, self.n_classes)
        flat = [
            grey.mean(1).flatten(1).double().numpy()
            for grey in (pixels, self.heldout_pixels, self.train_pixels)
        ]
        self.metrics |= {
            "shuffled_control": image.shuffled_control(seen, wanted, seed=self.how.seed),
            "class_share_min": float(shares.min()),
            "class_share_max": float(shares.max()),
            "nn_distance_ratio": image.nn_distance_ratio(*flat),
        }
        labels = [
            Label("", self.data.names.names[c][0], bool(s == c))
            for s, c in zip(seen[:100], wanted[:100], strict=True)
        ]
        self._show("class_to_image", pixels[:100], labels)

    def text_to_image(self) -> None:
        """Agreement of images drawn from class names, every name of every class in turn."""
        names = self.data.names.names
        texts = [
            names[c][(i // self.n_classes) % len(names[c])]
            for i, c in enumerate(self.wanted.tolist())
        ]
        pixels = self._draw_texts(texts)
        seen, _ = self._judge(pixels)
        wanted = self.wanted.numpy()
        self.metrics["t2i_accuracy"] = image.agreement(seen, wanted)
        labels = [
            Label(t, "", bool(s == c)) for t, s, c in zip(texts[:30], seen, wanted, strict=False)
        ]
        self._show("text_to_image", pixels[:30], labels)

    def image_to_text(self) -> None:
        """Captions of held-out images of the classes."""
        rows = balanced(self.data.heldout.class_ids, self.how.n)
        held = self.data.heldout.take(rows)
        texts = self._describe(held.latents)
        classes = held.class_ids.tolist()
        named, exact = caption_accuracy(self.data.names, texts, classes)
        self.metrics |= {"i2t_accuracy": named, "i2t_exact": exact}
        labels = [
            Label(text, truth, self.data.names.named(text) == c)
            for text, truth, c in zip(texts, held.texts, classes, strict=True)
        ]
        self._show("captions", self.heldout_pixels[rows[:30]], labels[:30])

    def joint(self) -> None:
        """Images and captions drawn together: does the caption name what is shown?"""
        names = self.data.names
        pixels, texts = self.generator.joint(
            self.how.n,
            guidance=self.how.joint_guidance,
            text_guidance=self.how.text_guidance,
            steps=self.how.joint_steps,
            seed=self.how.seed,
            solver=self.how.solver,
        )
        seen, _ = self._judge(pixels)
        agreed, counted = pair_agreement(names, texts, seen.tolist())
        self.metrics |= {"joint_agreement": agreed, "joint_class_share": counted}
        labels = [
            Label(
                text,
                "",
                names.named(text) == shown
                if names.concerns(text) or shown < self.n_classes
                else None,
            )
            for text, shown in zip(texts[:40], seen[:40].tolist(), strict=True)
        ]
        self._show("joint", pixels[:40], labels)

    def others(self) -> None:
        """Images of other things, drawn from names and captioned: trained on, and held out."""
        for name, rows in (
            ("others_train", self.data.others_train),
            ("others_heldout", self.data.others_heldout),
        ):
            if rows is None or len(rows) == 0:
                continue
            picked = rows.take(torch.linspace(0, len(rows) - 1, min(20, len(rows))).long())
            self._show(name, self._draw_texts(picked.texts), [Label(text) for text in picked.texts])
            captions = self._describe(picked.latents)
            labels = [Label(c, t, c == t) for c, t in zip(captions, picked.texts, strict=True)]
            self._show(f"{name}_real", self.data.decode(picked.latents), labels)
            exact = sum(bool(label.right) for label in labels)
            self.metrics[f"{name}_exact_captions"] = exact / len(picked)

    def replies(self) -> None:
        """Answers to the prompts, to read."""
        if not self.data.prompts:
            return
        texts = self.generator.reply(
            list(self.data.prompts),
            steps=self.how.text_steps,
            seed=self.how.seed,
            solver=self.how.solver,
        )
        self.result.replies = [
            {"turns": list(turns), "reply": text}
            for turns, text in zip(self.data.prompts, texts, strict=True)
        ]


def snapshot(
    generator: Generates,
    judge: Classifier,
    n_classes: int,
    texts: Sequence[str],
    settings: Settings,
) -> tuple[Tensor, float]:
    """A row of every class, a second one, and a row of `texts`, with fixed noise.

    The same call on later weights shows what was learnt in between. Also returns the agreement of
    the class rows, a rough one.
    """
    wanted = torch.arange(10 * max(1, 50 // n_classes)) % n_classes
    pixels = generator.class_to_image(
        wanted.tolist(),
        guidance=settings.guidance,
        steps=settings.steps,
        seed=settings.seed,
        solver=settings.solver,
    )
    rough = image.agreement(judge.judge(pixels)[0], wanted.numpy())
    shown = pixels[: 2 * n_classes]
    if texts:
        drawn = generator.text_to_image(
            list(texts[:n_classes]),
            guidance=settings.guidance,
            steps=settings.steps,
            seed=settings.seed,
            solver=settings.solver,
        )
        shown = torch.cat([shown, drawn])
    return shown, rough
