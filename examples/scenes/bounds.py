"""Floors and ceilings of every share, which do not depend on the model.

A floor is the judge's or the truth's score for shuffled texts, a ceiling the judge's view of real
held-out scenes after the autoencoder, read in place of the model's.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from examples.scenes import geneval
from examples.scenes.grammar import (
    COLOURS,
    DIGITS,
    KINDS,
    Item,
    Thing,
    dialogues,
    is_right,
    questions,
)
from examples.scenes.setting import Setting, Turns, exchanges, pattern, share, shuffled

_THINGS = [Thing(d, c) for d, c in itertools.product(range(len(DIGITS)), COLOURS)]


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
