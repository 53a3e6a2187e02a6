"""Captions, questions and dialogues of scenes, checked against strings written by hand."""

import dataclasses

import pytest

from examples.scenes import grammar
from examples.scenes.grammar import Caption, Item, Thing, dialogues, is_right, parse, questions


def item(digit: int, colour: str, x: float = 0.5, y: float = 0.5) -> Item:
    return Item(digit, colour, x, y, 0.3, 0.4)


SEVEN_AND_TWO = (item(7, "red", 0.25, 0.3), item(2, "blue", 0.75, 0.3))
THREES = (item(3, "green", 0.25, 0.25), item(3, "green", 0.75, 0.25))
NINE = (item(9, "yellow", 0.3, 0.8),)


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (SEVEN_AND_TWO, "a red seven left of a blue two"),
        (SEVEN_AND_TWO, "a blue two right of a red seven"),
        (SEVEN_AND_TWO, "a two and a red seven"),
        (SEVEN_AND_TWO, "a seven in red and a two"),
        (THREES, "two green threes"),
        (THREES, "two threes"),
        (NINE, "a yellow nine"),
        (NINE, "a nine in yellow"),
        (NINE, "a nine at the bottom left"),
        ((item(8, "red", 0.7, 0.2),), "an eight at the top right"),
    ],
)
def test_true_captions_are_right(scene, caption):
    assert is_right(caption, scene)


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (SEVEN_AND_TWO, "a red one left of a blue two"),  # digit
        (SEVEN_AND_TWO, "a green seven left of a blue two"),  # colour
        (SEVEN_AND_TWO, "a blue seven left of a red two"),  # colours swapped
        (SEVEN_AND_TWO, "a red seven right of a blue two"),  # relation
        (SEVEN_AND_TWO, "a red seven above a blue two"),
        (SEVEN_AND_TWO, "a red seven"),  # only a part of the scene
        (SEVEN_AND_TWO, "two sevens"),
        (SEVEN_AND_TWO, "a seven and a seven"),  # one digit named twice
        (SEVEN_AND_TWO, "a red seven and a seven"),
        (SEVEN_AND_TWO, "a red seven left of a blue"),  # no whole caption
        (SEVEN_AND_TWO, "a red seven left of a blue two two"),
        (SEVEN_AND_TWO, "red seven left of a blue two"),
        (SEVEN_AND_TWO, ""),
        (THREES, "three green threes"),  # count
        (THREES, "two green fives"),
        (THREES, "a green three"),
        (NINE, "a nine at the top left"),  # place
        (NINE, "a nine at the bottom right"),
        (NINE, "a nine at the bottom"),
        (NINE, "an nine"),  # article
    ],
)
def test_wrong_or_incomplete_captions_are_not_right(scene, caption):
    assert not is_right(caption, scene)


def test_parsing_returns_what_was_written():
    things = (Thing(7, "red"), Thing(8, "", 1))
    wholes = [
        Caption(things, "left of"),
        Caption(things),
        Caption((Thing(3, "green", 2),)),
        Caption((Thing(6, "pink", 4),)),
        Caption((Thing(8, "cyan", colour_last=True),)),
        Caption((Thing(2, "blue"),), place="bottom right"),
    ]
    for caption in wholes:
        for variant in caption.variants():
            assert parse(str(variant)) == variant
    assert str(wholes[0]) == "a red seven left of an eight"
    assert str(wholes[3]) == "four pink sixes"


def test_every_variant_of_a_caption_is_true_of_its_scene():
    whole = parse("a red seven left of a blue two")
    variants = whole.variants()
    assert len(variants) == 6
    assert all(v.holds(SEVEN_AND_TWO) for v in variants)
    swapped = [dataclasses.replace(SEVEN_AND_TWO[0], x=0.75), SEVEN_AND_TWO[1]]
    swapped[1] = dataclasses.replace(swapped[1], x=0.25)
    assert sum(v.holds(swapped) for v in variants) == 2  # those without a relation


@pytest.mark.parametrize("relation", grammar.RELATIONS)
def test_without_a_relation_things_are_named_as_they_are_read(relation):
    turned = relation in ("right of", "below")
    named = [str(v) for v in parse(f"a seven {relation} a two").variants() if not v.relation]
    assert named == ["a two and a seven" if turned else "a seven and a two"]


def test_relations_follow_genevals_rule():
    def between(dx: float, dy: float) -> set[str]:
        return grammar.relations(item(1, "red", 0.5 + dx, 0.5 + dy), item(2, "red"))

    assert between(-0.3, 0.05) == {"left of"}
    assert between(0.3, 0.05) == {"right of"}
    assert between(0, -0.4) == {"above"}
    assert between(0.1, 0.4) == {"below"}
    assert between(0.4, 0.4) == {"right of", "below"}
    assert between(0.05, 0.05) == set()  # within a tenth of both sizes


def test_questions_have_the_answers_that_the_scene_gives():
    pairs = {q.text: a for q, a in questions(SEVEN_AND_TWO, [Thing(7, "blue")])}
    assert pairs == {
        "how many digits?": "two",
        "what colour is the seven?": "red",
        "what colour is the two?": "blue",
        "where is the seven?": "top left",
        "where is the two?": "top right",
        "how many sevens?": "one",
        "how many twos?": "one",
        "what digit is red?": "seven",
        "what digit is blue?": "two",
        "is there a red seven?": "yes",
        "is there a blue two?": "yes",
        "is there a blue seven?": "no",
        "what is left of the two?": "a red seven",
        "what is right of the seven?": "a blue two",
    }
    several = {q.text: a for q, a in questions(THREES)}
    assert several["how many threes?"] == "two"
    assert several["what colour are the threes?"] == "green"
    assert not any(text.startswith("where") for text in several), "there are two answers"


def test_every_question_begins_with_its_kind():
    for scene in (SEVEN_AND_TWO, THREES, NINE):
        for question, _ in questions(scene):
            kinds = [kind for kind in grammar.KINDS if question.text.startswith(kind)]
            assert kinds == [question.kind]


def test_dialogues_speak_of_what_was_said_before():
    assert dialogues(SEVEN_AND_TWO)[0] == (
        "what colour is the seven?",
        "red",
        "the two?",
        "blue",
        "where?",
        "top right",
    )
    assert dialogues(NINE)[0][-1] == "bottom left"
    assert dialogues(THREES)[0] == (
        "how many?",
        "two",
        "which ones?",
        "threes",
        "in what colour?",
        "green",
    )
