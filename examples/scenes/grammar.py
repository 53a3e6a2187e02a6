"""The language of the scenes: one grammar writes captions, reads them, and answers questions.

    caption  = thing [place] | thing relation thing | thing "and" thing | count [colour] digits
    thing    = ("a" | "an") [colour] digit ["in" colour]
    relation = "left of" | "right of" | "above" | "below"
    place    = "at the" ("top" | "bottom") ("left" | "right")

A caption speaks of every digit of its scene, so that a wrong number of digits makes it wrong.
Places are shares of the image's sides, from its upper left corner.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = tuple("sixes" if word == "six" else f"{word}s" for word in DIGITS)
COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
PLACES = {
    "top left": "at the top left",
    "top right": "at the top right",
    "bottom left": "at the bottom left",
    "bottom right": "at the bottom right",
}
# GenEval's relative position: an offset counts beyond this share of both sizes, and a direction
# holds where it makes up half of the offset that is left.
SLACK, HALF = 0.1, 0.5


@dataclass(frozen=True)
class Item:
    """A digit of a scene, drawn or seen: what it is, its centre of mass, and its size."""

    digit: int  # -1: seen, but no digit
    colour: str
    x: float
    y: float
    width: float
    height: float
    confidence: float = 1.0  # of the digit, if it was seen

    @property
    def place(self) -> str:
        """The quarter of the image that it is in: a key of `PLACES`."""
        return f"{'top' if self.y < 0.5 else 'bottom'} {'left' if self.x < 0.5 else 'right'}"


def relations(one: Item, other: Item) -> set[str]:
    """The relations in which `one` stands to `other`, by GenEval's rule."""
    offset = []
    for gap, size in (
        (one.x - other.x, one.width + other.width),
        (one.y - other.y, one.height + other.height),
    ):
        beyond = max(abs(gap) - SLACK * size, 0.0)
        offset.append(beyond if gap > 0 else -beyond)
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if length < 1e-3:
        return set()
    dx, dy = offset[0] / length, offset[1] / length
    holds = (dx < -HALF, dx > HALF, dy < -HALF, dy > HALF)
    return {name for name, is_so in zip(RELATIONS, holds, strict=True) if is_so}


@dataclass(frozen=True)
class Thing:
    """`count` digits of one kind, as a caption names them; colour "" is left open."""

    digit: int
    colour: str = ""
    count: int = 1
    colour_last: bool = False  # "a seven in red"

    def __str__(self) -> str:
        colour = f"{self.colour} " if self.colour else ""
        if self.count > 1:
            return f"{COUNTS[self.count]} {colour}{PLURALS[self.digit]}"
        if self.colour_last:
            return f"{_with_article(DIGITS[self.digit])} in {self.colour}"
        return _with_article(colour + DIGITS[self.digit])

    def among(self, items: Sequence[Item]) -> list[Item]:
        """Those of `items` that it names."""
        return [i for i in items if i.digit == self.digit and self.colour in ("", i.colour)]


@dataclass(frozen=True)
class Caption:
    """What a caption says: its things, and how two stand to each other or where one is."""

    things: tuple[Thing, ...]
    relation: str = ""  # of the first to the second; "": only that both are there
    place: str = ""  # of the only thing

    def __str__(self) -> str:
        if self.place:
            return f"{self.things[0]} {PLACES[self.place]}"
        return f" {self.relation or 'and'} ".join(map(str, self.things))

    def plain(self) -> "Caption":
        """The caption without colours."""
        things = tuple(replace(t, colour="", colour_last=False) for t in self.things)
        return replace(self, things=things)

    def variants(self) -> list["Caption"]:
        """All captions that say this or a part of it, about every digit of the scene.

        Two things without a relation are named as they are read, from the left or the top.
        """
        whole = [self]
        if self.relation:
            turned = Caption(self.things[::-1], OPPOSITE[self.relation])
            first_is_named_first = self.relation in ("left of", "above")
            whole += [turned, replace(self if first_is_named_first else turned, relation="")]
        elif self.place:
            thing = self.things[0]
            whole += [replace(self, place=""), Caption((replace(thing, colour_last=True),))]
        return list(dict.fromkeys([*whole, *(caption.plain() for caption in whole)]))

    def holds(self, items: Sequence[Item]) -> bool:
        """Whether all it says is true of a scene, of which it names every digit."""
        if sum(thing.count for thing in self.things) != len(items):
            return False
        named = [thing.among(items) for thing in self.things]
        if any(len(n) != t.count for n, t in zip(named, self.things, strict=True)):
            return False
        if {id(item) for of_thing in named for item in of_thing} != set(map(id, items)):
            return False  # "a four and a four" names the only four twice
        if self.relation and self.relation not in relations(named[0][0], named[1][0]):
            return False
        return self.place in ("", named[0][0].place)


def _with_article(words: str) -> str:
    return f"{'an' if words.startswith('eight') else 'a'} {words}"


@cache
def _things() -> dict[str, Thing]:
    """Every thing by its words."""
    singles = [
        Thing(digit, colour, colour_last=last)
        for digit in range(len(DIGITS))
        for colour in ("", *COLOURS)
        for last in ((False, True) if colour else (False,))
    ]
    several = [
        Thing(digit, colour, count)
        for digit in range(len(DIGITS))
        for colour in ("", *COLOURS)
        for count in COUNTS
        if count > 1
    ]
    return {str(thing): thing for thing in singles + several}


def parse(text: str) -> Caption | None:
    """What a text says, or None unless it is a whole caption of the grammar, word for word."""
    things = _things()
    if thing := things.get(text):
        return Caption((thing,))
    for place, words in PLACES.items():
        thing = things.get(text.removesuffix(f" {words}"))
        if thing and thing.count == 1:
            return Caption((thing,), place=place)
    for relation in ("", *RELATIONS):
        first, joint, second = text.partition(f" {relation or 'and'} ")
        pair = [things.get(first), things.get(second)]
        if joint and all(thing is not None and thing.count == 1 for thing in pair):
            return Caption(tuple(thing for thing in pair if thing), relation)
    return None


def is_right(text: str, items: Sequence[Item]) -> bool:
    """Whether a generated caption is a whole one and true of the scene."""
    caption = parse(text)
    return caption is not None and caption.holds(items)


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its type, as VQAv2 groups them."""

    kind: str
    text: str


WHAT_COLOUR, WHAT_DIGIT, WHERE = "what colour", "what digit", "where is"
HOW_MANY, IS_THERE, WHAT_IS = "how many", "is there", "what is"
KINDS = (WHAT_COLOUR, WHAT_DIGIT, WHERE, HOW_MANY, IS_THERE, WHAT_IS)


def questions(items: Sequence[Item], others: Sequence[Thing] = ()) -> list[tuple[Question, str]]:
    """Every question about a scene that has one answer, with the answer.

    `others` are things to ask for that may not be there.
    """
    pairs = [(Question(HOW_MANY, "how many digits?"), COUNTS[len(items)])]
    for digit in dict.fromkeys(item.digit for item in items):
        named = Thing(digit).among(items)
        if len({item.colour for item in named}) == 1:
            who = DIGITS[digit] if len(named) == 1 else PLURALS[digit]
            verb = "is" if len(named) == 1 else "are"
            question = Question(WHAT_COLOUR, f"what colour {verb} the {who}?")
            pairs.append((question, named[0].colour))
        if len(named) == 1:
            pairs.append((Question(WHERE, f"where is the {DIGITS[digit]}?"), named[0].place))
        pairs.append((Question(HOW_MANY, f"how many {PLURALS[digit]}?"), COUNTS[len(named)]))
    for colour in dict.fromkeys(item.colour for item in items):
        if len({item.digit for item in items if item.colour == colour}) == 1:
            digit = next(item.digit for item in items if item.colour == colour)
            pairs.append((Question(WHAT_DIGIT, f"what digit is {colour}?"), DIGITS[digit]))
    present = [Thing(item.digit, item.colour) for item in items]
    for thing in dict.fromkeys([*present, *others]):
        answer = "yes" if thing.among(items) else "no"
        pairs.append((Question(IS_THERE, f"is there {thing}?"), answer))
    if len(items) == 2 and items[0].digit != items[1].digit:
        for one, other in itertools.permutations(items):
            for relation in sorted(relations(one, other)):
                text = f"what is {relation} the {DIGITS[other.digit]}?"
                pairs.append((Question(WHAT_IS, text), str(Thing(one.digit, one.colour))))
    return pairs


def dialogues(items: Sequence[Item]) -> list[tuple[str, ...]]:
    """Dialogues of several turns about a scene, whose later questions rest on earlier turns."""
    first = items[0]
    total = ("how many?", COUNTS[len(items)])
    if len(items) == 1:
        where = ("where?", first.place)
        digit = ("what digit is it?", DIGITS[first.digit])
        colour = ("in what colour?", first.colour)
        what = ("what is it?", str(Thing(first.digit, first.colour)))
        return [(*total, *what, *where), (*total, *digit, *colour), (*digit, *colour, *where)]
    if len({item.digit for item in items}) == 1:
        return [(*total, "which ones?", PLURALS[first.digit], "in what colour?", first.colour)]
    if len(items) > 2:  # of several kinds: no scene is drawn so
        return []
    talks: list[tuple[str, ...]] = []
    for one, other in itertools.permutations(items):
        colour = (f"what colour is the {DIGITS[one.digit]}?", one.colour)
        second = (f"the {DIGITS[other.digit]}?", other.colour)
        talks.append((*colour, *second, "where?", other.place))
        what = (f"{one.place}?", str(Thing(one.digit, one.colour)))
        rest = ("the other?", str(Thing(other.digit, other.colour)))
        talks.append((*total, *what, *rest))
    return talks
