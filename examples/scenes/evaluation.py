"""Evaluates a model on held-out scenes: images from prompts, captions, answers, replies.

`examples.scenes.bounds` has the floor and the ceiling of every share. Shapes: n images, S pixels a
side, N image tokens, C latent width.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.digits.evaluation import Sampling
from examples.scenes import geneval
from examples.scenes.grammar import (
    DIGITS,
    KINDS,
    Item,
    is_right,
)
from examples.scenes.setting import Setting, Turns, share, shuffled
from mdm.evaluate.suite import Label
from mdm.generate import Generator

REPLY_ROOM = 4  # tokens of the longest reply with its end


@dataclass
class Result:
    """Numbers, images f32 [n, 3, S, S] by name, their labels in order, and dialogues to read."""

    metrics: dict[str, float]
    images: dict[str, Tensor]
    labels: dict[str, list[Label]]


def evaluate(
    model: Generator,
    setting: Setting,
    sampling: Sampling,
    candidates: int = 1,
    joint: bool = True,
) -> Result:
    """Every share of the model, and what it generated.

    Of `candidates` captions, answers and replies, the most typical one counts.
    """
    result = Result({}, {}, {})
    image: dict[str, Any] = {
        "guidance": sampling.guidance,
        "steps": sampling.steps,
        "solver": sampling.solver,
        "seed": setting.seed,
    }
    text: dict[str, Any] = {
        "guidance": sampling.text_guidance,
        "candidates": candidates,
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
    if joint:
        both = {
            "guidance": sampling.joint_guidance,
            "steps": sampling.joint_steps,
            "solver": sampling.text_solver,
            "seed": setting.seed,
        }
        _join(model, setting, both, result)
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
    said = model.image_to_text(setting.latents, **text)
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
