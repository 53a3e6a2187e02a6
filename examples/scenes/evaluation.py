"""Evaluates a model on held-out scenes: images from prompts, captions, answers, replies.

Every share stands beside its floor (the judge's or the truth's score for shuffled texts) and its
ceiling (the judge's view of real held-out scenes after the autoencoder, read in place of the
model's). Shapes: n images, S pixels a side, N image tokens, C latent width.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.digits.evaluation import Sampling
from examples.scenes import geneval
from examples.scenes.grammar import (
    COLOURS,
    DIGITS,
    KINDS,
    PLURALS,
    Caption,
    Item,
    Question,
    Thing,
    dialogues,
    is_right,
    questions,
)
from examples.scenes.judge import Judge
from examples.scenes.scene import Scene, draw, generator
from mdm.evaluate.suite import Label
from mdm.generate import Generator

SHUFFLES = 20
REPLY_ROOM = 5  # tokens of the longest reply with its end
_THINGS = [Thing(d, c) for d, c in itertools.product(range(len(DIGITS)), COLOURS)]
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


def answer_of(question: str, items: Sequence[Item]) -> str:
    """The answer that a scene of these items gives; "" where the question has none."""
    readable = [item for item in items if item.digit >= 0]
    if not 1 <= len(readable) <= 4:
        return ""
    known = {asked.text: answer for asked, answer in questions(readable, _THINGS)}
    return known.get(question, "")


def replies_of(turns: Turns, items: Sequence[Item]) -> Turns:
    """The replies of a scene of these items to the questions in `turns`; () if it has none."""
    readable = [item for item in items if item.digit >= 0]
    if not 1 <= len(readable) <= 4:
        return ()
    return next((t[1::2] for t in dialogues(readable) if t[::2] == turns[::2]), ())


def bounds(setting: Setting) -> dict[str, float]:
    """Floors and ceilings of every share, which do not depend on the model."""
    metrics: dict[str, float] = {}
    for task, prompts in setting.prompts.items():
        images = setting.real[task]
        again = setting.judge.see(setting.decode(setting.encode(images)))

        def score(order: list[int], task: str = task, seen: Any = again) -> float:
            asked = setting.prompts[task]
            return geneval.accuracy(task, [asked[i] for i in order], seen)

        metrics[f"geneval_{task}_real"] = geneval.accuracy(task, prompts, setting.judge.see(images))
        metrics[f"geneval_{task}_ceiling"] = geneval.accuracy(task, prompts, again)
        metrics[f"geneval_{task}_floor"] = shuffled(score, len(prompts), setting.seed)
    items = [scene.items for scene in setting.scenes]
    captions, asked = setting.captions, setting.asked

    def caption_score(order: list[int]) -> float:
        return share(is_right(captions[i], own) for i, own in zip(order, items, strict=True))

    def answer_score(order: list[int]) -> float:
        # Within the kinds of questions: a colour is no answer to "how many".
        by_kind = {k: [a.answer for a in asked if a.question.kind == k] for k in KINDS}
        ranked = sorted(range(len(asked)), key=lambda i: order[i])
        given = {i: by_kind[asked[i].question.kind].pop() for i in ranked}
        return share(given[i] == a.answer for i, a in enumerate(asked))

    metrics |= {
        "caption_accuracy_floor": shuffled(caption_score, len(items), setting.seed),
        "caption_accuracy_ceiling": share(map(is_right, captions, setting.seen)),
        "vqa_accuracy_floor": shuffled(answer_score, len(asked), setting.seed),
        "vqa_accuracy_ceiling": share(
            answer_of(a.question.text, setting.seen[a.scene]) == a.answer for a in asked
        ),
        "vqa_majority": share(
            setting.majority.answers.get(a.question.kind) == a.answer for a in asked
        ),
        "dialogue_accuracy_ceiling": _dialogue_ceiling(setting),
        "dialogue_majority": share(
            setting.majority.replies.get(pattern(question)) == reply
            for turns in setting.talks
            for question, reply in exchanges(turns)
        ),
    }
    return metrics


def _dialogue_ceiling(setting: Setting) -> float:
    right: list[bool] = []
    for turns, seen in zip(setting.talks, setting.seen, strict=True):
        truth, read = turns[1::2], replies_of(turns, seen)
        right += [a == b for a, b in zip(truth, read or [""] * len(truth), strict=True)]
    return share(right)


@dataclass
class Result:
    """Numbers, images f32 [n, 3, S, S] by name, their labels in order, and dialogues to read."""

    metrics: dict[str, float]
    images: dict[str, Tensor]
    labels: dict[str, list[Label]]


def evaluate(model: Generator, setting: Setting, sampling: Sampling) -> Result:
    """Every share of the model with its floor and ceiling, and what it generated."""
    result = Result(bounds(setting), {}, {})
    image: dict[str, Any] = {
        "guidance": sampling.guidance,
        "steps": sampling.steps,
        "solver": sampling.solver,
        "seed": setting.seed,
    }
    text: dict[str, Any] = {
        "steps": 2 * sampling.steps,
        "solver": sampling.text_solver,
        "seed": setting.seed,
    }
    for task, prompts in setting.prompts.items():
        drawn = model.text_to_image([str(prompt) for prompt in prompts], **image)
        seen = setting.judge.see(drawn)
        result.metrics[f"geneval_{task}"] = geneval.accuracy(task, prompts, seen)
        result.images[task] = drawn
        result.labels[task] = [
            Label(str(prompt), describe(items), geneval.is_right(task, prompt, items))
            for prompt, items in zip(prompts, seen, strict=True)
        ]
    _describe(model, setting, text, result)
    _answer(model, setting, text, result)
    _reply(model, setting, text, result)
    _join(model, setting, text | {"guidance": sampling.joint_guidance}, result)
    result.images["real"] = setting.decode(setting.latents)
    result.labels["real"] = [
        Label(caption, describe(items), is_right(caption, items))
        for caption, items in zip(setting.captions, setting.seen, strict=True)
    ]
    return result


def describe(items: Sequence[Item]) -> str:
    """What the judge sees, in words."""
    named = [f"{i.colour} {DIGITS[i.digit]}" if i.digit >= 0 else "a blot" for i in items]
    return f"seen: {', '.join(named) or 'nothing'}"


def _describe(model: Generator, setting: Setting, text: dict[str, Any], result: Result) -> None:
    """Captions of the held-out scenes."""
    said = model.image_to_text(setting.latents, guidance=0.0, **text)
    right = [is_right(t, scene.items) for t, scene in zip(said, setting.scenes, strict=True)]
    result.metrics["caption_accuracy"] = share(right)
    result.images["captions"] = setting.pixels
    result.labels["captions"] = [
        Label(t, truth, r) for t, truth, r in zip(said, setting.captions, right, strict=True)
    ]


def _join(model: Generator, setting: Setting, both: dict[str, Any], result: Result) -> None:
    """Images and captions drawn together: is the caption true of what is seen?"""
    joint, said = model.joint(len(setting.scenes), **both)
    seen = setting.judge.see(joint)

    def score(order: list[int]) -> float:
        return share(is_right(said[i], items) for i, items in zip(order, seen, strict=True))

    result.metrics["joint_agreement"] = score(list(range(len(said))))
    result.metrics["joint_agreement_floor"] = shuffled(score, len(said), setting.seed)
    result.images["joint"] = joint
    result.labels["joint"] = [
        Label(text, describe(items), is_right(text, items))
        for text, items in zip(said, seen, strict=True)
    ]


def _answer(model: Generator, setting: Setting, text: dict[str, Any], result: Result) -> None:
    """Answers to questions about the held-out scenes, by kind and in all."""
    asked = setting.asked
    at = torch.tensor([a.scene for a in asked])
    images = setting.latents[at].unsqueeze(1)
    said = model.reply([(a.question.text,) for a in asked], images=images, **text)
    right = [t.strip() == a.answer for t, a in zip(said, asked, strict=True)]
    result.metrics["vqa_accuracy"] = share(right)
    for kind in KINDS:
        of_kind = [r for r, a in zip(right, asked, strict=True) if a.question.kind == kind]
        if of_kind:
            result.metrics[f"vqa_accuracy_{kind.replace(' ', '_')}"] = share(of_kind)
    result.images["answers"] = setting.pixels[at]
    result.labels["answers"] = [
        Label(f"{a.question.text} {t}", a.answer, r)
        for a, t, r in zip(asked, said, right, strict=True)
    ]


def _reply(model: Generator, setting: Setting, text: dict[str, Any], result: Result) -> None:
    """Replies in dialogues about the held-out scenes, each after the true turns before it."""
    prompts, at, truth = [], [], []
    for number, turns in enumerate(setting.talks):
        for end in range(1, len(turns), 2):
            prompts.append(_fitting(model, turns[:end]))
            at.append(number)
            truth.append(turns[end])
    images = setting.latents[torch.tensor(at)].unsqueeze(1)
    said = model.reply(prompts, images=images, **text)
    right = [t.strip() == wanted for t, wanted in zip(said, truth, strict=True)]
    result.metrics["dialogue_accuracy"] = share(right)
    whole = defaultdict[int, list[bool]](list)
    for number, is_so in zip(at, right, strict=True):
        whole[number].append(is_so)
    result.metrics["dialogue_whole"] = share(all(w) for w in whole.values())
    lines = defaultdict[int, list[str]](list)
    for number, prompt, reply in zip(at, prompts, said, strict=True):
        lines[number].append(f"{prompt[-1]} {reply}")
    result.images["dialogues"] = setting.pixels
    result.labels["dialogues"] = [
        Label(" · ".join(lines[k]), " · ".join(turns[1::2]), all(whole[k]))
        for k, turns in enumerate(setting.talks)
    ]


def _fitting(model: Generator, turns: Turns) -> Turns:
    """The last turns that leave room for a reply: whole exchanges are forgotten, as in training."""
    length = model.config.data.caption_length
    while len(turns) > 1 and len(model.tokenizer.encode_prompt(turns)) + REPLY_ROOM > length:
        turns = turns[2:]
    return turns
