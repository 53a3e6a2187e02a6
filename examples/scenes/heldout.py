"""The held-out task of a written data set, and the judge that is trained for it."""

from collections.abc import Iterator
from pathlib import Path

from examples.scenes import geneval, judge
from examples.scenes.data import (
    CAPTIONS,
    QUESTIONS,
    Flags,
    asked,
    captions,
    scenes,
    texts_rng,
    written_with,
)
from examples.scenes.grammar import KINDS, dialogues
from examples.scenes.judge import Judge
from examples.scenes.scene import generator
from examples.scenes.setting import Asked, Majority, Setting, Turns
from mdm import sources
from mdm.first_stage.autoencoder import Autoencoder
from mdm.sources.record import RawRecord

JUDGE_SCENES = 5000  # training scenes whose digits the judge's classifier reads


def train_judge(flags: Flags) -> Judge:
    """A judge that has read the digits of training scenes."""
    number = min(JUDGE_SCENES, flags.journeydb)
    return judge.train(
        (scene for _, scene in scenes(flags, "journeydb", False, number)), flags.seed
    )


def turns_of(name: str, root: Path) -> Iterator[Turns]:
    """The dialogues of a published set's training split."""
    for record in sources.records(name, root, "train"):
        if isinstance(record, RawRecord):
            yield record.turns


def majority(folder: Path) -> Majority:
    """The commonest answers and replies in the training data of this folder."""
    answers = (
        (next(kind for kind in KINDS if question.startswith(kind)), answer)
        for question, answer in turns_of("vqav2", folder / "coco")
    )
    return Majority.of(answers, turns_of("llava", folder / "llava"))


def setting(folder: Path, seen_by: Judge, first_stage: Autoencoder, prompts: int) -> Setting:
    """The held-out scenes of the published data in `folder`, with `prompts` for each task."""
    flags = written_with(folder)
    number = flags.heldout
    drawn = dict(scenes(flags, "coco", True, number))
    said, questions, talks = [], list[Asked](), []
    for position, (i, scene) in enumerate(drawn.items()):
        rng = texts_rng(flags, "coco", True, i)
        said.append(captions(scene, rng, CAPTIONS)[0])
        questions += [Asked(position, q, a) for q, a in asked(scene, rng, QUESTIONS)]
        every = dialogues(scene.items)
        talks.append(every[int(generator(flags.seed, 6, i).integers(len(every)))])

    return Setting(
        judge=seen_by,
        encode=first_stage.encode,
        decode=first_stage.decode,
        scenes=list(drawn.values()),
        captions=said,
        asked=questions,
        talks=talks,
        prompts={task: geneval.prompts(task, prompts, flags.seed) for task in geneval.TASKS},
        majority=majority(folder),
        seed=flags.seed,
    )
