"""Questions about COCO images: the layout that VQAv2 and OK-VQA share.

One file holds `questions [{question_id, image_id, question}]`, another `annotations [{question_id,
image_id, answers [10], …}]`; the images are those of COCO 2014, `COCO_train2014_<12 digits>.jpg`.
An annotation without a question is an error, and so is one about another image than its question.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdm.sources.annotated import Annotated, Content, Layout, by_id
from mdm.sources.fields import number_field, text_field
from mdm.sources.joined import Join, Joined
from mdm.sources.packed import locate

SPLITS: tuple[str, ...] = ("train", "val")
TRAINING: tuple[tuple[str, ...], ...] = (("train",),)
HELD_OUT = "val"

# The possible files of a split's questions, and those of its annotations.
Names = Callable[[str], tuple[tuple[str, ...], tuple[str, ...]]]


def reader(source: str, names: Names, answer: Callable[[dict[str, Any]], str]) -> Annotated:
    """The reader of one such set; `answer` extracts the answer from an annotation."""

    def image_and_answer(entry: dict[str, Any]) -> tuple[int, str]:
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
            join=Join(annotations, "annotations", "question_id", image_and_answer, required=True),
        )

    return Annotated(source, SPLITS, find, by_id("question_id"), _content)


def _content(entry: Any, layout: Layout, joined: Joined) -> Content:
    key = number_field(entry.get("question_id"), "question_id")
    image_id = number_field(entry.get("image_id"), "image_id")
    question = text_field(entry.get("question"), "question")
    annotated_id, answer = joined.get(key, "question_id")
    if annotated_id != image_id:
        raise ValueError(
            f"question is about image_id {image_id}, its annotation about {annotated_id}"
        )
    edition = f"{layout.split}2014"
    file = f"{edition}/COCO_{edition}_{image_id:012d}.jpg"
    return Content((file, f"images/{file}"), turns=(question, answer))
