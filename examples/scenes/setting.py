"""The held-out task that a model of scenes is evaluated on, and what it is compared with.

Shapes: n images, S pixels a side, N image tokens, C latent width.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from examples.scenes import geneval
from examples.scenes.grammar import DIGITS, PLURALS, Caption, Item, Question
from examples.scenes.judge import Judge
from examples.scenes.scene import Scene, draw, generator

SHUFFLES = 20
Turns = tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A held-out scene with what is said about it: by its number in `Setting.scenes`."""

    scene: int
    question: Question
    answer: str


@dataclass(frozen=True)
class Majority:
    """The commonest answer in the training set, to each kind of question and in each turn."""

    answers: Mapping[str, str]
    replies: Mapping[str, str]

    @classmethod
    def of(cls, answers: Iterable[tuple[str, str]], talks: Iterable[Turns]) -> "Majority":
        """From training answers with the kinds of their questions, and training dialogues."""
        pairs = (pair for turns in talks for pair in exchanges(turns))
        return cls(_commonest(answers), _commonest((pattern(q), reply) for q, reply in pairs))


def _commonest(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer in pairs:
        counts[kind][answer] += 1
    # The first by alphabet among equally frequent ones.
    return {kind: min(c, key=lambda a: (-c[a], a)) for kind, c in counts.items()}


def exchanges(turns: Turns) -> list[tuple[str, str]]:
    """The questions of a dialogue with their replies."""
    return list(zip(turns[::2], turns[1::2], strict=True))


def pattern(question: str) -> str:
    """A question with its digits left out: "what colour is the *?"."""
    for word in (*PLURALS, *DIGITS):
        question = question.replace(f"the {word}", "the *")
    return question


@dataclass(frozen=True)
class Setting:
    """The held-out task: scenes and what is asked about them, prompts, and the judge."""

    judge: Judge
    encode: Callable[[Tensor], Tensor]  # pixels f32 [n, 3, S, S] → latents [n, N, C]
    decode: Callable[[Tensor], Tensor]  # latents → pixels
    scenes: Sequence[Scene]
    captions: Sequence[str]  # a true one of each scene
    asked: Sequence[Asked]
    talks: Sequence[Turns]  # of each scene
    prompts: Mapping[str, Sequence[Caption]]  # of each of GenEval's tasks
    majority: Majority
    seed: int = 0

    @cached_property
    def pixels(self) -> Tensor:
        """The scenes' images, f32 [n, 3, S, S] in [0, 1]."""
        return to_pixels(self.scenes)

    @cached_property
    def latents(self) -> Tensor:
        """Of the scenes' images, f32 [n, N, C]."""
        return self.encode(self.pixels)

    @cached_property
    def real(self) -> dict[str, Tensor]:
        """For each of GenEval's tasks, real images that are what its prompts ask for."""
        size = len(self.scenes[0].pixels)
        return {
            task: to_pixels(
                [
                    draw(prompt, generator(self.seed, 7, geneval.TASKS.index(task), i), size, True)
                    for i, prompt in enumerate(prompts)
                ]
            )
            for task, prompts in self.prompts.items()
        }

    @cached_property
    def seen(self) -> list[list[Item]]:
        """What the judge sees in the scenes after the autoencoder."""
        return self.judge.see(self.decode(self.latents))


def to_pixels(scenes: Sequence[Scene]) -> Tensor:
    """The images of scenes as f32 [n, 3, S, S] in [0, 1]."""
    images = np.stack([scene.pixels for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def share(right: Iterable[bool]) -> float:
    """The share of True."""
    return float(np.mean(list(right)))


def shuffled(score: Callable[[list[int]], float], number: int, seed: int) -> float:
    """The mean score of a number of texts in other orders."""
    rng = np.random.default_rng(seed)
    return float(np.mean([score(rng.permutation(number).tolist()) for _ in range(SHUFFLES)]))
