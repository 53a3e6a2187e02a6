"""Scenes of coloured MNIST digits: what is in one, how it is drawn, what is held out.

A scene is a function of (seed, number): its digits' handwriting, colours and places come from a
counter-based generator, and every pixel is computed alone in float64: the same on every machine.

Shapes: S pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.published import mnist
from examples.scenes.grammar import (
    COLOURS,
    DIGITS,
    PLACES,
    RELATIONS,
    Caption,
    Item,
    Thing,
)

Pixels = NDArray[np.uint8]
TRAIN_DIGITS = 400  # images of each digit; the other 100 are for held-out scenes alone
UNIT = 32  # all sizes and places below are pixels of an image with sides of this length
SIZES = (13, 14)  # longest side of a digit
CELLS = ((0, 15), (17, 32))  # of a digit in a quarter of the image, from its sides
MOVES = 1  # from the middle of its cell, either way
FAINT = 60  # of 255: ink at a digit's edge that is not counted in its size
HUES = dict(zip(COLOURS, (0, 55, 120, 180, 228, 310), strict=True))  # degrees
HUE_RANGE = 6  # by which a colour varies either way


def held_out_colour(digit: int, colour: str) -> bool:
    """Whether no training scene holds the digit in this colour: one colour for each digit."""
    return COLOURS.index(colour) == digit % len(COLOURS)


def held_out_pair(one: int, other: int) -> bool:
    """Whether no training scene holds both digits: 9 of the 45 pairs."""
    return one != other and (one + other) % 5 == 0


def held_out_count(digit: int, count: int) -> bool:
    """Whether no training scene holds this digit so many times: 2 digits for each number."""
    return count > 1 and (digit + count) % 5 == 0


def is_held_out(things: Sequence[Thing]) -> bool:
    """Whether a scene of these coloured things has a combination that training never shows."""
    return (
        any(t.colour and held_out_colour(t.digit, t.colour) for t in things)
        or any(held_out_count(t.digit, t.count) for t in things)
        or (len(things) == 2 and held_out_pair(things[0].digit, things[1].digit))
    )


@dataclass(frozen=True)
class Scene:
    """What is drawn: `pixels` uint8 [S, S, 3], and the true items."""

    caption: Caption  # all that can be said of it
    items: tuple[Item, ...]
    pixels: Pixels


def generator(seed: int, *number: int) -> np.random.Generator:
    """The generator of a scene, or of anything else with a number of its own."""
    counter = [0] * (4 - len(number)) + list(number)
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def draw_things(rng: np.random.Generator, held_out: bool) -> Caption:
    """One digit, two, or several of a kind, in places; held out or never."""
    while True:
        kind = int(rng.integers(20))
        digits = [int(d) for d in rng.permutation(len(DIGITS))[:2]]
        colours = [COLOURS[int(c)] for c in rng.integers(len(COLOURS), size=2)]
        if kind < 5:
            place = tuple(PLACES)[int(rng.integers(len(PLACES)))]
            caption = Caption((Thing(digits[0], colours[0]),), place=place)
        elif kind < 15:
            things = tuple(Thing(d, c) for d, c in zip(digits, colours, strict=True))
            caption = Caption(things, RELATIONS[int(rng.integers(len(RELATIONS)))])
        else:
            caption = Caption((Thing(digits[0], colours[0], int(rng.integers(2, 5))),))
        if is_held_out(caption.things) == held_out and not _doubly_held_out(caption.things):
            return caption


def _doubly_held_out(things: Sequence[Thing]) -> bool:
    """Whether a held-out pair or count also has a held-out colour: one new thing at a time."""
    alone = [t.colour and held_out_colour(t.digit, t.colour) for t in things]
    return any(alone) and (len(things) > 1 or things[0].count > 1)


def complete(caption: Caption, rng: np.random.Generator) -> Caption:
    """The caption with a colour, place or relation wherever it leaves one open."""
    things = []
    for thing in caption.things:
        seen = [c for c in COLOURS if not held_out_colour(thing.digit, c)]
        colour = thing.colour or seen[int(rng.integers(len(seen)))]
        things.append(Thing(thing.digit, colour, thing.count))
    relation, place = caption.relation, caption.place
    if len(things) == 2:
        relation = relation or RELATIONS[int(rng.integers(len(RELATIONS)))]
    elif things[0].count == 1:
        place = place or tuple(PLACES)[int(rng.integers(len(PLACES)))]
    return Caption(tuple(things), relation, place)


def draw(caption: Caption, rng: np.random.Generator, size: int, held_out: bool) -> Scene:
    """A scene of which the caption is true, S = `size`, in training or held-out handwriting."""
    caption = complete(caption, rng)
    while True:
        scene = _drawn(caption, rng, size, held_out)
        if caption.holds(scene.items):  # one digit in a thousand is heavy on one side
            return scene


def _drawn(caption: Caption, rng: np.random.Generator, size: int, held_out: bool) -> Scene:
    canvas = np.zeros((size, size, 3))
    scale, items = size / UNIT, []
    names = [thing for thing in caption.things for _ in range(thing.count)]
    for thing, cell in zip(names, _cells(caption, rng), strict=True):
        longest = round(scale * int(rng.integers(SIZES[0], SIZES[1] + 1)))
        ink = _ink(thing.digit, int(rng.integers(_handwritings(held_out))), longest, held_out)
        height, width = ink.shape
        x, y = (_place(rng, scale, cell[k], cell[k + 2], (width, height)[k]) for k in (0, 1))
        window = canvas[y : y + height, x : x + width]
        alpha = ink[:, :, None] / 255
        window[:] = window * (1 - alpha) + _rgb(thing.colour, rng) * alpha
        columns, rows = (ink.sum(axis) / ink.sum() for axis in (0, 1))
        items.append(
            Item(
                thing.digit,
                thing.colour,
                x=float(x + 0.5 + columns @ np.arange(width)) / size,
                y=float(y + 0.5 + rows @ np.arange(height)) / size,
                width=width / size,
                height=height / size,
            )
        )
    return Scene(caption, tuple(items), np.rint(canvas).astype(np.uint8))


def _cells(caption: Caption, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Where each digit may be: left, top, right, bottom."""
    (a, b), (c, d) = CELLS
    quarters = [(a, a, b, b), (c, a, d, b), (a, c, b, d), (c, c, d, d)]  # as in PLACES
    if caption.place:
        return [quarters[tuple(PLACES).index(caption.place)]]
    if caption.relation:
        row_or_column = int(rng.integers(2))
        if caption.relation in ("left of", "right of"):
            pair = quarters[2 * row_or_column : 2 * row_or_column + 2]
        else:
            pair = quarters[row_or_column::2]
        return pair if caption.relation in ("left of", "above") else pair[::-1]
    picked = rng.permutation(len(quarters))[: caption.things[0].count]
    return [quarters[int(i)] for i in picked]


def _place(rng: np.random.Generator, scale: float, low: int, high: int, length: int) -> int:
    """Where a digit of this length begins: near the middle of its cell, and within it."""
    move = rng.integers(-round(scale * MOVES), round(scale * MOVES) + 1)
    start = int(scale * (low + high) - length) // 2 + int(move)
    return min(max(start, round(scale * low)), round(scale * high) - length)


def _handwritings(held_out: bool) -> int:
    return len(_images()[0]) - TRAIN_DIGITS if held_out else TRAIN_DIGITS


@cache
def _images() -> list[Pixels]:
    """The 500 images of each digit, uint8 [500, 28, 28]."""
    images, labels = mnist()
    pixels = images.reshape(-1, 28, 28).astype(np.uint8)
    return [pixels[labels == digit] for digit in range(len(DIGITS))]


def _ink(digit: int, number: int, longest: int, held_out: bool) -> NDArray[np.float64]:
    """An image's ink without its margin, 0 to 255, with a longest side of this many pixels."""
    page = _images()[digit][TRAIN_DIGITS + number if held_out else number]
    rows, columns = (np.flatnonzero(page.max(axis) > FAINT) for axis in (1, 0))
    tight = page[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = longest / max(tight.shape)
    height, width = (max(1, round(side * scale)) for side in tight.shape)
    smooth = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    resized = Image.fromarray(tight).resize((width, height), smooth)
    # Smaller strokes are paler: make them as bright as they were.
    ink: NDArray[np.float64] = np.asarray(resized, np.float64)
    ink = np.minimum(ink * (255 / max(ink.max(), 1)) * 1.25, 255.0)
    return ink


def _rgb(colour: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """The colour, varied a little, 0 to 255."""
    hue = HUES[colour] + float(rng.uniform(-HUE_RANGE, HUE_RANGE))
    saturation, value = float(rng.uniform(0.8, 0.95)), float(rng.uniform(0.9, 1.0))
    # The usual conversion: each channel falls from `value` with its distance on the circle.
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    shares = np.clip(np.minimum(k, 4 - k), 0, 1)
    return 255 * (value - value * saturation * shares)
