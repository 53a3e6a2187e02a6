"""Questions about images: GQA, OCR-VQA, TextVQA, VizWiz, VQAv2, OK-VQA and Visual Genome.

A record is one question with its answer, as a dialogue of two turns. Where several people
answered, the answer is the most frequent one. Test splits without answers are not read.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mdm.sources import jsonfile
from mdm.sources.annotated import Annotated, Content, Layout, by_id, by_name, nested
from mdm.sources.fields import commonest, exchange, id_field, list_field, number_field, text_field
from mdm.sources.joined import Join, Joined
from mdm.sources.jsonfile import Element
from mdm.sources.packed import locate

# ---- GQA: `{train,val,testdev}_balanced_questions.json` and `images/<imageId>.jpg`.
#
# One object, question id -> `{question, imageId, answer, fullAnswer, …}`, loose or in
# `questions1.2.zip`; images may still be in `images.zip`. The answer is the short one.


def _gqa_layout(root: Path, split: str) -> Layout:
    name = f"{split}_balanced_questions.json"
    annotations = locate("gqa", root, name, f"questions/{name}", f"questions1.2.zip::{name}")
    return Layout(split, annotations, folders=("images",), archives=("images.zip",))


def _gqa_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    image_id = id_field(entry.get("imageId"), "imageId")
    return Content((f"images/{image_id}.jpg",), turns=exchange(entry))


GQA = Annotated("gqa", _gqa_layout, by_name, _gqa_content, ("train", "val", "testdev"))


# ---- OCR-VQA: `dataset.json` and `images/<id><extension>`.
#
# One object, id -> `{imageURL, questions [], answers [], split, title, …}`; split 1 is for
# training, 2 for validation, 3 for testing. An image is saved under the entry's id with the
# extension of its URL, or with that of another image format. Problems of an entry without a known
# split are reported with the training split.

_BOOK_SPLITS = ("train", "val", "test")


def _book_layout(root: Path, split: str) -> Layout:
    annotations = locate("ocrvqa", root, "dataset.json")
    return Layout(split, annotations, folders=("images",), archives=("images.zip",))


def _book_entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    try:
        key, book = id_field(element.name, "id"), jsonfile.entry(element)
        number = number_field(book.get("split"), "split")
        if not 1 <= number <= len(_BOOK_SPLITS):
            raise ValueError(f"field split is {number}, not 1, 2 or 3")
    except ValueError:
        if layout.split == "train":
            raise
        return
    if _BOOK_SPLITS[number - 1] != layout.split:
        return
    questions = list_field(book.get("questions"), "questions")
    answers = list_field(book.get("answers"), "answers")
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions, but {len(answers)} answers")
    fields = {"id": key, "imageURL": book.get("imageURL")}
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        yield f"{key}/{i}", {**fields, "question": question, "answer": answer}


def _book_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    stem, url = f"images/{entry['id']}", entry.get("imageURL")
    extension = PurePosixPath(re.split(r"[?#]", url)[0]).suffix if isinstance(url, str) else ""
    return Content(tuple(dict.fromkeys((stem + extension, stem))), turns=exchange(entry))


OCRVQA = Annotated("ocrvqa", _book_layout, _book_entries, _book_content, _BOOK_SPLITS)


# ---- TextVQA: `TextVQA_0.5.1_{train,val}.json` and `train_images/<image_id>.jpg`.
#
# One object with a list `data [{question, question_id, image_id, answers [10], …}]`; the images of
# both splits are in `train_images/`, or still in `train_val_images.zip`.


def _textvqa_layout(root: Path, split: str) -> Layout:
    annotations = locate("textvqa", root, f"TextVQA_0.5.1_{split}.json")
    folders, archives = ("train_images",), ("train_val_images.zip",)
    return Layout(split, annotations, "data", folders=folders, archives=archives)


def _textvqa_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    image_id = id_field(entry.get("image_id"), "image_id")
    question = text_field(entry.get("question"), "question")
    answer = commonest(entry.get("answers"), "answers")
    return Content((f"train_images/{image_id}.jpg",), turns=(question, answer))


TEXTVQA = Annotated("textvqa", _textvqa_layout, by_id("question_id"), _textvqa_content)


# ---- VizWiz VQA: `{train,val}.json` and the images of the split.
#
# A list `[{image, question, answers [{answer, answer_confidence}], answer_type, answerable}]`, in
# the data set's folder, in `Annotations/` or in `Annotations.zip`; images are in `train/` … or
# `train.zip` …. A record's id is the image's name. For a question that cannot be answered, the
# answer is usually the word "unanswerable".


def _vizwiz_layout(root: Path, split: str) -> Layout:
    name, packed = f"{split}.json", "Annotations.zip"
    places = (name, f"Annotations/{name}", f"{packed}::{name}", f"{packed}::Annotations/{name}")
    annotations = locate("vizwiz", root, *places)
    return Layout(split, annotations, folders=(split,), archives=(f"{split}.zip",))


def _vizwiz_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    image = text_field(entry.get("image"), "image")
    question = text_field(entry.get("question"), "question")
    answer = commonest(entry.get("answers"), "answers", "answer")
    return Content((f"{layout.split}/{image}",), turns=(question, answer))


VIZWIZ = Annotated("vizwiz", _vizwiz_layout, by_id("image"), _vizwiz_content)


# ---- VQAv2 and OK-VQA: questions about the images of COCO 2014.
#
# One file holds `questions [{question_id, image_id, question}]`, another `annotations
# [{question_id, image_id, answers [10], …}]`; images are `COCO_train2014_<12 digits>.jpg` in
# `train2014/` … or `train2014.zip` …. An annotation without a question is an error, and so is one
# about another image than its question.


def _mscoco_vqa(
    source: str,
    questions: Callable[[str], tuple[str, str]],
    annotations: Callable[[str], tuple[str, str]],
    answer: Callable[[dict[str, Any]], str],
) -> Annotated:
    """The reader of such a set: where each file of a split may be, and an annotation's answer."""

    def image_and_answer(entry: dict[str, Any]) -> tuple[int, str]:
        return number_field(entry.get("image_id"), "image_id"), answer(entry)

    def layout(root: Path, split: str) -> Layout:
        edition = f"{split}2014"
        question_file = locate(source, root, *questions(split))
        file = locate(source, root, *annotations(split))
        return Layout(
            split=split,
            annotations=question_file,
            section="questions",
            folders=(edition, f"images/{edition}"),
            archives=(f"{edition}.zip",),
            join=Join(file, "annotations", "question_id", image_and_answer, required=True),
        )

    return Annotated(source, layout, by_id("question_id"), _mscoco_vqa_content)


def _mscoco_vqa_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    key = number_field(entry.get("question_id"), "question_id")
    image_id = number_field(entry.get("image_id"), "image_id")
    question = text_field(entry.get("question"), "question")
    assert joined is not None
    annotated_id, answer = joined.get(key, "question_id")
    if annotated_id != image_id:
        raise ValueError(
            f"question is about image_id {image_id}, its annotation about {annotated_id}"
        )
    edition = f"{layout.split}2014"
    file = f"{edition}/COCO_{edition}_{image_id:012d}.jpg"
    return Content((file, f"images/{file}"), turns=(question, answer))


def _in_zip(archive: str, file: str) -> tuple[str, str]:
    return file, f"{archive}.zip::{file}"


def _published_choice(annotation: dict[str, Any]) -> str:
    """The published choice; ValueError if it or one of the given answers is bad."""
    if "answers" in annotation:
        commonest(annotation["answers"], "answers", "answer")
    return text_field(annotation.get("multiple_choice_answer"), "multiple_choice_answer")


VQAV2 = _mscoco_vqa(
    "vqav2",
    lambda split: _in_zip(
        f"v2_Questions_{split.capitalize()}_mscoco",
        f"v2_OpenEnded_mscoco_{split}2014_questions.json",
    ),
    lambda split: _in_zip(
        f"v2_Annotations_{split.capitalize()}_mscoco", f"v2_mscoco_{split}2014_annotations.json"
    ),
    _published_choice,
)
# Each file may be in `<file>.zip`. OK-VQA's field `answer` is a stem, which is often not a word.
OKVQA = _mscoco_vqa(
    "okvqa",
    lambda split: _in_zip(*[f"OpenEnded_mscoco_{split}2014_questions.json"] * 2),
    lambda split: _in_zip(*[f"mscoco_{split}2014_annotations.json"] * 2),
    lambda annotation: commonest(annotation.get("answers"), "answers", "raw_answer"),
)


# ---- Visual Genome: `question_answers.json`, `region_descriptions.json` and `VG_100K{,_2}/`.
#
# Lists with one element per image: `{id, qas [{qa_id, image_id, question, answer, …}]}` and `{id,
# regions [{region_id, image_id, phrase, x, y, width, height}]}`, loose or in `<file>.zip`; images
# `<image_id>.jpg` may still be in `images.zip` and `images2.zip`. In split `regions`, a record is
# one phrase as the text of the whole image, since a record has no box.

_GENOME_FOLDERS = ("VG_100K", "VG_100K_2")


def _genome_layout(root: Path, split: str) -> Layout:
    name = "question_answers.json" if split == "qa" else "region_descriptions.json"
    annotations = locate("visual_genome", root, *_in_zip(name, name))
    archives = ("images.zip", "images2.zip")
    return Layout(split, annotations, folders=_GENOME_FOLDERS, archives=archives)


def _genome_entries(element: Element, layout: Layout) -> Iterator[tuple[str, Any]]:
    field, key = ("qas", "qa_id") if layout.split == "qa" else ("regions", "region_id")
    return nested(element, field, key)


def _genome_content(entry: Any, layout: Layout, joined: Joined | None) -> Content:
    image_id = id_field(entry.get("image_id"), "image_id")
    names = tuple(f"{folder}/{image_id}.jpg" for folder in _GENOME_FOLDERS)
    if layout.split == "qa":
        return Content(names, turns=exchange(entry))
    return Content(names, text=text_field(entry.get("phrase"), "phrase"))


VISUAL_GENOME = Annotated(
    SOURCE="visual_genome",
    find=_genome_layout,
    entries=_genome_entries,
    content=_genome_content,
    SPLITS=("qa", "regions"),
    TRAINING=(("qa", "regions"),),
    HELD_OUT="",
)
