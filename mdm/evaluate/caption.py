"""Scoring captions: which class does a text name?

A class has several names ("seven", "digit seven", "handwritten seven"). Words that occur in the
names of every class ("digit", "handwritten") show that a text is about the classes at all.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NO_CLASS = -1


def _words(text: str) -> str:
    """The words of `text`, separated by single spaces."""
    return " ".join(re.findall(r"[\w'’-]+", text.casefold()))


@dataclass(frozen=True)
class ClassNames:
    """The names of each class: `names[c]` is a tuple of equivalent names."""

    names: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, listed: Iterable[str]) -> "ClassNames":
        """Parse one comma-separated string per class, as ImageNet's mapping writes them."""
        names = tuple(tuple(n.strip() for n in line.split(",") if n.strip()) for line in listed)
        if () in names:
            raise ValueError(f"class {names.index(())} has no name")
        return cls(names)

    def __len__(self) -> int:
        return len(self.names)

    def named(self, text: str) -> int:
        """The class whose name occurs in `text` as whole words; -1 if none or several do."""
        words = f" {_words(text)} "
        classes = [
            index
            for index, names in enumerate(self.names)
            if any(f" {_words(name)} " in words for name in names)
        ]
        return classes[0] if len(classes) == 1 else NO_CLASS

    def concerns(self, text: str) -> bool:
        """Whether `text` is about the classes, rightly or not.

        It is if it holds a word common to all classes, or only words of class names:
        "handwritten apple" and "three" are, "three o'clock" is not.
        """
        words = set(_words(text).split())
        vocabulary = [set(_words(" ".join(names)).split()) for names in self.names]
        common, known = set.intersection(*vocabulary), set.union(*vocabulary)
        return bool(words & common) or (bool(words) and words <= known)

    def exact(self, text: str, class_id: int) -> bool:
        """Whether `text` is, word for word, one of the names of `class_id`."""
        return _words(text) in {_words(name) for name in self.names[class_id]}


def caption_accuracy(
    names: ClassNames, texts: Sequence[str], class_ids: Sequence[int]
) -> tuple[float, float]:
    """Shares of `texts` that name their class, and that are one of its names word for word."""
    pairs = list(zip(texts, class_ids, strict=True))
    named = sum(names.named(t) == c for t, c in pairs) / len(pairs)
    exact = sum(names.exact(t, c) for t, c in pairs) / len(pairs)
    return named, exact


def pair_agreement(
    names: ClassNames, captions: Sequence[str], image_classes: Sequence[int]
) -> tuple[float, float]:
    """Agreement of generated pairs, and the share of pairs that it is computed over.

    A pair counts if either side is about the classes: the caption concerns them, or the image shows
    one (`image_classes`, any value outside the classes for none). It agrees if its caption names
    the class of its image.
    """
    counted = [
        (names.named(text), shown)
        for text, shown in zip(captions, image_classes, strict=True)
        if names.concerns(text) or 0 <= shown < len(names)
    ]
    agreed = sum(named == shown and named != NO_CLASS for named, shown in counted)
    return (agreed / len(counted) if counted else 0.0), len(counted) / len(captions)
