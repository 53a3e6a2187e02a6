"""The metrics of a perfect model of scenes, of one that errs in a known way, and of real images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.digits.evaluation import Sampling
from examples.scenes import evaluation, geneval
from examples.scenes.bounds import answer_of, bounds, replies_of
from examples.scenes.data import Flags, asked, captions, scenes, texts_rng
from examples.scenes.grammar import Caption, Item, Thing, dialogues, parse
from examples.scenes.judge import Judge
from examples.scenes.scene import draw, generator
from examples.scenes.setting import Asked, Majority, Setting, share, shuffled, to_pixels

N = 60
SAMPLING = Sampling(steps=2)


def decode(latents: Tensor) -> Tensor:
    return latents.reshape(len(latents), 3, 32, 32)


@pytest.fixture(scope="module")
def setting(scene_judge: Judge) -> Setting:
    drawn = [scene for _, scene in scenes(Flags(), "coco", True, N)]
    rngs = [texts_rng(Flags(), "coco", True, i + 1) for i in range(N)]
    pairs = zip(drawn, rngs, strict=True)
    questions = [Asked(i, q, a) for i, (s, rng) in enumerate(pairs) for q, a in asked(s, rng, 3)]
    talks = [dialogues(scene.items)[0] for scene in drawn]
    return Setting(
        judge=scene_judge,
        encode=lambda pixels: pixels.reshape(len(pixels), 1, -1),
        decode=decode,
        scenes=drawn,
        captions=[captions(s, r, 1)[0] for s, r in zip(drawn, rngs, strict=True)],
        asked=questions,
        talks=talks,
        prompts={task: geneval.prompts(task, N, seed=0) for task in geneval.TASKS},
        majority=Majority.of([(a.question.kind, a.answer) for a in questions], talks),
    )


class Perfect:
    """A model that draws, describes and answers from the truth, or ignores what it is given."""

    def __init__(self, setting: Setting, blind: bool = False) -> None:
        self.setting, self.blind = setting, blind
        self.config = SimpleNamespace(data=SimpleNamespace(caption_length=100))
        self.tokenizer = SimpleNamespace(encode_prompt=lambda turns: list(turns))

    def scene_of(self, latents: Tensor) -> int:
        if self.blind:
            return 0
        return int((self.setting.latents - latents.reshape(1, 1, -1)).abs().sum((1, 2)).argmin())

    def text_to_image(self, texts: list[str], **options: object) -> Tensor:
        prompts = [parse(texts[0] if self.blind else text) for text in texts]
        drawn = [draw(p, generator(1, i), 32, True) for i, p in enumerate(prompts)]
        return to_pixels(drawn)

    def image_to_text(self, latents: Tensor, **options: object) -> list[str]:
        return [self.setting.captions[self.scene_of(row)] for row in latents]

    def reply(self, turns: list[tuple[str, ...]], *, images: Tensor, **options: object):
        if self.blind:
            return ["red"] * len(turns)
        seen = [self.setting.scenes[self.scene_of(row)].items for row in images]
        said = []
        for asked_turns, items in zip(turns, seen, strict=True):
            talk = next((t for t in dialogues(items) if t[: len(asked_turns)] == asked_turns), None)
            said.append(talk[len(asked_turns)] if talk else answer_of(asked_turns[-1], items))
        return said

    def joint(self, n: int, **options: object) -> tuple[Tensor, list[str]]:
        prompts = [self.setting.captions[0 if self.blind else i] for i in range(n)]
        if self.blind:
            return self.setting.pixels, prompts
        drawn = [draw(parse(p), generator(2, i), 32, True) for i, p in enumerate(prompts)]
        return to_pixels(drawn), prompts


def test_a_perfect_model_reaches_the_ceilings(setting):
    result = evaluation.evaluate(Perfect(setting), setting, SAMPLING)
    metrics = bounds(setting) | result.metrics
    assert metrics["caption_accuracy"] == 1.0
    assert metrics["vqa_accuracy"] == 1.0
    assert metrics["dialogue_accuracy"] == metrics["dialogue_whole"] == 1.0
    for task in geneval.TASKS:
        ceiling = metrics[f"geneval_{task}_ceiling"]
        assert ceiling > 0.5
        assert abs(metrics[f"geneval_{task}"] - ceiling) < 0.2, task
        assert metrics[f"geneval_{task}_floor"] < 0.5 * ceiling
    assert metrics["joint_agreement"] > 0.6
    assert metrics["joint_agreement_floor"] < 0.2
    assert metrics["caption_accuracy_ceiling"] > 0.7
    assert metrics["caption_accuracy_floor"] < 0.2
    assert metrics["vqa_accuracy_ceiling"] > 0.7
    assert metrics["dialogue_accuracy_ceiling"] > 0.7
    assert metrics["vqa_accuracy_floor"] < 0.6
    assert metrics["vqa_majority"] < 0.8


def test_texts_are_the_most_typical_of_the_candidates_and_pairs_have_their_own_steps(setting):
    options = {}

    class Recording(Perfect):
        def image_to_text(self, latents, **given):
            options["captions"] = given
            return super().image_to_text(latents, **given)

        def reply(self, turns, **given):
            options["answers" if "answers" not in options else "replies"] = given
            return super().reply(turns, **given)

        def joint(self, n, **given):
            options["pairs"] = given
            return super().joint(n, **given)

    sampling = Sampling(steps=2, text_guidance=0.5, joint_guidance=2.0, joint_steps=7)
    evaluation.evaluate(Recording(setting), setting, sampling, candidates=3)
    for name in ("captions", "answers", "replies"):
        given = options[name]
        assert (given["candidates"], given["guidance"]) == (3, 0.5), name
        assert "steps" not in given, "as the model was trained"
    assert (options["pairs"]["guidance"], options["pairs"]["steps"]) == (2.0, 7)
    assert "candidates" not in options["pairs"]


def test_a_model_that_ignores_its_condition_is_at_the_floors(setting):
    result = evaluation.evaluate(Perfect(setting, blind=True), setting, SAMPLING)
    metrics = result.metrics
    assert metrics["caption_accuracy"] < 0.2
    assert metrics["vqa_accuracy"] < 0.2
    assert metrics["joint_agreement"] < 0.2
    for task in geneval.TASKS:
        assert metrics[f"geneval_{task}"] < 0.5, task
    assert {len(result.images[name]) - len(result.labels[name]) for name in result.images} == {0}


def item(digit: int, colour: str, x: float) -> Item:
    return Item(digit, colour, x, 0.3, 0.3, 0.4)


def test_answers_of_what_the_judge_sees():
    seen = [item(7, "red", 0.25), item(2, "blue", 0.75)]
    assert answer_of("what colour is the seven?", seen) == "red"
    assert answer_of("is there a green two?", seen) == "no"
    assert answer_of("is there a blue two?", seen) == "yes"
    assert answer_of("what is left of the two?", seen) == "a red seven"
    assert answer_of("what colour is the nine?", seen) == ""
    assert answer_of("how many digits?", [*seen, item(-1, "red", 0.5)]) == "two"
    assert answer_of("how many digits?", []) == ""
    turns = ("what colour is the seven?", "?", "the two?", "?", "where?", "?")
    assert replies_of(turns, seen) == ("red", "blue", "top right")
    assert replies_of(turns, seen[:1]) == ()
    assert replies_of(turns, [*seen, item(3, "red", 0.5)]) == ()
    assert replies_of(turns, []) == ()


def test_the_majority_is_the_commonest_training_answer():
    talks = [("what colour is the two?", "red"), ("what colour is the six?", "red")]
    majority = Majority.of([("how many", "two"), ("how many", "two"), ("how many", "one")], talks)
    assert majority.answers == {"how many": "two"}
    assert majority.replies == {"what colour is the *?": "red"}


def test_wrong_images_lose_their_task_and_no_other(setting):
    """Images that are wrong in one respect, through the judge itself."""
    pairs = [(7, "red", 4, "cyan"), (9, "cyan", 5, "red"), (3, "pink", 6, "yellow")] * 8

    def images(swap_places: bool, swap_colours: bool) -> list[list[Item]]:
        drawn = []
        for i, (a, one, b, other) in enumerate(pairs):
            things = (
                Thing(a, other if swap_colours else one),
                Thing(b, one if swap_colours else other),
            )
            asked_for = Caption(things, "right of" if swap_places else "left of")
            drawn.append(draw(asked_for, generator(3, i), 32, True))
        return setting.judge.see(to_pixels(drawn))

    position = [Caption((Thing(a), Thing(b)), "left of") for a, _, b, _ in pairs]
    bound = [Caption((Thing(a, one), Thing(b, other))) for a, one, b, other in pairs]
    right, moved, crossed = images(False, False), images(True, False), images(False, True)
    there = geneval.accuracy("two", bound, right)
    assert there > 0.6
    assert geneval.accuracy("position", position, right) == there
    assert geneval.accuracy("attribution", bound, right) == there
    assert geneval.accuracy("position", position, moved) == 0.0
    assert geneval.accuracy("attribution", bound, moved) > 0.6
    assert geneval.accuracy("attribution", bound, crossed) == 0.0
    assert geneval.accuracy("position", position, crossed) > 0.6
    assert geneval.accuracy("counting", [Caption((Thing(2, count=3),))] * 24, right) == 0.0


def test_shares_and_shuffles():
    assert share([True, False, True, True]) == 0.75
    score = shuffled(lambda order: np.mean(np.arange(50) == order), 50, seed=0)
    assert score < 0.1
    assert torch.equal(
        to_pixels([SimpleNamespace(pixels=np.full((2, 2, 3), 255, np.uint8))]),
        torch.ones(1, 3, 2, 2),
    )
