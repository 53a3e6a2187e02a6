"""Scikit-learn's 8 x 8 digits as a small real data set, with a lossless patch "encoder"."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from mdm.evaluate import classifier
from mdm.evaluate.caption import ClassNames
from mdm.evaluate.heldout import Encoded, Images
from mdm.evaluate.suite import DemoData

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NAMES = ClassNames.parse(f"{w}, digit {w}, handwritten {w}" for w in WORDS)


def encode(pixels: Tensor) -> Tensor:
    """f32 [n, 3, 32, 32] made by `decode` → latents [n, 16, 16]: 4 x 4 patches of 2 x 2 pixels."""
    small = pixels[:, 0, 2::4, 2::4]  # [n, 8, 8]
    patches = small.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(small), 16, 4)
    return F.pad(patches, (0, 12))


def decode(latents: Tensor) -> Tensor:
    """Latents [n, 16, 16] → pixels [n, 3, 32, 32]."""
    patches = latents[:, :, :4].reshape(-1, 4, 4, 2, 2)
    small = patches.permute(0, 1, 3, 2, 4).reshape(-1, 1, 8, 8)
    return F.interpolate(small, scale_factor=4.0, mode="nearest").expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Digits:
    train: Images
    heldout: Images
    spare: Images  # real images that are in neither

    def encoded(self, which: str) -> Encoded:
        images: Images = getattr(self, which)
        texts = tuple(f"handwritten {WORDS[c]}" for c in images.labels.tolist())
        return Encoded(encode(images.pixels), texts, images.labels)


@pytest.fixture(scope="session")
def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    small = 1.0 - torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    pixels = F.interpolate(small, scale_factor=4.0, mode="nearest").repeat(1, 3, 1, 1)
    # The set is sorted by writer: shuffled, its parts are alike.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], torch.tensor(labels)[order]
    cut = [slice(0, 900), slice(900, 1350), slice(1350, None)]
    return Digits(*(Images(pixels[c], labels[c]) for c in cut))


@pytest.fixture(scope="session")
def judge(digits: Digits) -> classifier.Classifier:
    train = digits.train
    return classifier.train(train.pixels, train.labels, 10, epochs=6, batch=64)


@pytest.fixture(scope="session")
def demo_data(digits: Digits) -> DemoData:
    return DemoData(
        NAMES,
        digits.encoded("train"),
        digits.encoded("heldout"),
        digits.heldout,
        decode,
        prompts=(("hello",), ("how are you?", "fine", "good")),
    )


class Oracle:
    """Answers with real images and true names: what a perfect model would give."""

    def __init__(self, digits: Digits, pool: str = "spare", ignores_requests: bool = False) -> None:
        self.pool: Images = getattr(digits, pool)
        self.known = {
            tuple(row): c
            for which in ("heldout", "spare")
            for row, c in zip(
                encode(getattr(digits, which).pixels).flatten(1).tolist(),
                getattr(digits, which).labels.tolist(),
                strict=True,
            )
        }
        self.ignores_requests = ignores_requests  # its answers do not depend on them

    def class_to_image(
        self, class_ids: list[int], *, guidance: float, steps: int, seed: int, solver: str
    ) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        if self.ignores_requests:
            return self.pool.pixels[torch.randint(len(self.pool), (len(class_ids),), generator=rng)]
        where = {c: torch.nonzero(self.pool.labels == c).squeeze(1) for c in range(10)}
        rows = [
            int(where[c][int(torch.randint(len(where[c]), (), generator=rng))]) for c in class_ids
        ]
        return self.pool.pixels[rows]

    def text_to_image(
        self, texts: list[str], *, guidance: float, steps: int, seed: int, solver: str
    ) -> Tensor:
        classes = [NAMES.named(t) for t in texts]
        return self.class_to_image(
            classes, guidance=guidance, steps=steps, seed=seed, solver=solver
        )

    def image_to_text(
        self,
        latents: Tensor,
        *,
        guidance: float,
        candidates: int = 1,
        steps: int = 20,
        seed: int,
        solver: str,
    ) -> list[str]:
        if self.ignores_requests:
            return ["digit one"] * len(latents)
        return [f"digit {WORDS[self.known[tuple(row)]]}" for row in latents.flatten(1).tolist()]

    def reply(
        self,
        turns: list[tuple[str, ...]],
        *,
        candidates: int = 1,
        steps: int = 20,
        seed: int,
        solver: str,
    ) -> list[str]:
        return [f"<b>{turn[-1]}</b>" for turn in turns]

    def joint(
        self,
        n: int,
        *,
        guidance: float,
        steps: int,
        seed: int,
        solver: str,
        text_guidance: float = 0.0,
    ) -> tuple[Tensor, list[str]]:
        classes = [i % 10 for i in range(n)]
        pixels = self.class_to_image(classes, guidance=0.0, steps=steps, seed=seed, solver=solver)
        return pixels, [f"handwritten {WORDS[c]}" for c in classes]
