"""OK-VQA: `OpenEnded_mscoco_{train,val}2014_questions.json` and `mscoco_…_annotations.json`.

The files are loose or in `<file>.zip`, the images in `train2014/` … or `train2014.zip` …
(`mscoco_vqa.py`). A record is one question with its most frequent `raw_answer`, as a dialogue;
`answer` is its stem, which is often not a word. Types and confidences are ignored.
"""

from typing import Any

from mdm.sources import mscoco_vqa
from mdm.sources.fields import commonest

SOURCE = "okvqa"
SPLITS = mscoco_vqa.SPLITS
TRAINING, HELD_OUT = mscoco_vqa.TRAINING, mscoco_vqa.HELD_OUT


def _names(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    questions = f"OpenEnded_mscoco_{split}2014_questions.json"
    annotations = f"mscoco_{split}2014_annotations.json"
    return (
        (questions, f"{questions}.zip::{questions}"),
        (annotations, f"{annotations}.zip::{annotations}"),
    )


def _answer(annotation: dict[str, Any]) -> str:
    return commonest(annotation.get("answers"), "answers", "raw_answer")


_reader = mscoco_vqa.reader(SOURCE, _names, _answer)
units, read, texts = _reader.units, _reader.read, _reader.texts
