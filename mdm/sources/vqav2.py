"""VQAv2: `v2_OpenEnded_mscoco_{train,val}2014_questions.json` and `v2_mscoco_…_annotations.json`.

The files are loose or in `v2_Questions_{Train,Val}_mscoco.zip` and `v2_Annotations_…`, the images
in `train2014/` … or `train2014.zip` … (`mscoco_vqa.py`). A record is one question with its
`multiple_choice_answer`, the most frequent answer, as a dialogue; the answers' types and
confidences are ignored. The test questions have no answers and are not read.
"""

from typing import Any

from mdm.sources import mscoco_vqa
from mdm.sources.fields import commonest, text_field

SOURCE = "vqav2"
SPLITS = mscoco_vqa.SPLITS
TRAINING, HELD_OUT = mscoco_vqa.TRAINING, mscoco_vqa.HELD_OUT


def _names(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    questions = f"v2_OpenEnded_mscoco_{split}2014_questions.json"
    annotations = f"v2_mscoco_{split}2014_annotations.json"
    part = split.capitalize()
    return (
        (questions, f"v2_Questions_{part}_mscoco.zip::{questions}"),
        (annotations, f"v2_Annotations_{part}_mscoco.zip::{annotations}"),
    )


def _answer(annotation: dict[str, Any]) -> str:
    """The published choice; ValueError if it or one of the given answers is bad."""
    if "answers" in annotation:
        commonest(annotation["answers"], "answers", "answer")
    return text_field(annotation.get("multiple_choice_answer"), "multiple_choice_answer")


_reader = mscoco_vqa.reader(SOURCE, _names, _answer)
units, read, texts = _reader.units, _reader.read, _reader.texts
