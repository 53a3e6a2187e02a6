"""Questions about COCO pictures: the layout that VQAv2 and OK-VQA share.

One file holds `questions [{question_id, image_id, question}]`, another `annotations [{question_id,
image_id, answers [10], …}]`; pictures are those of COCO 2014, `COCO_train2014_<12 digits>.jpg`. An
annotation without a question is an error, and so are two that speak of different pictures.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdm.sources.annotated import Annotated, Content, Layout, by_id
from mdm.sources.fields import number_field, text_field
from mdm.sources.joined import Join, Joined
from mdm.sources.packed import locate

SPLITS: tuple[str, ...] = ("train", "val")
TRAINING = (("train",),)
HELD_OUT = "val"

# Names of the two files of a split, without the folders or archives they may lie in.
Names = Callable[[str], tuple[tuple[str, ...], tuple[str, ...]]]


def reader(source: str, names: Names, answer: Callable[[dict[str, Any]], str]) -> Annotated:
    """The reader of one such set; `answer` picks the answer from an annotation."""

    def picked(entry: dict[str, Any]) -> tuple[int, str]:
        return number_field(entry.get("image_id"), "image_id"), answer(entry)

    def find(root: Path, split: str) -> Layout:
        questions, annotations = (locate(source, root, *files) for files in names(split))
        edition = f"{split}2014"
        return Layout(
            split=split,
            annotations=questions,
            section="questions",
            folders=(edition, f"images/{edition}"),
            archives=(f"{edition}.zip",),
            join=Join(annotations, "annotations", "question_id", picked, required=True),
        )

    return Annotated(source, SPLITS, find, by_id("question_id"), _content)


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    key = number_field(entry.get("question_id"), "question_id")
    picture = number_field(entry.get("image_id"), "image_id")
    question = text_field(entry.get("question"), "question")
    answered, answer = joined.get(key, "question_id")
    if answered != picture:
        raise ValueError(f"question is about image_id {picture}, its annotation about {answered}")
    edition = f"{layout.split}2014"
    file = f"{edition}/COCO_{edition}_{picture:012d}.jpg"
    return Content((file, f"images/{file}"), turns=(question, answer))
