"""What the judge measures, on solid shapes with known answers and on real scenes."""

import numpy as np
import pytest
import torch

from examples.scenes import geneval, judge
from examples.scenes.data import Flags, scenes
from examples.scenes.grammar import COLOURS, RELATIONS, Caption, Item, Thing
from examples.scenes.judge import hue, locate, nearest_colour
from examples.scenes.scene import HUES, is_held_out

RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 40, 255), "yellow": (255, 230, 0)}


def bar(image: np.ndarray, colour: str, left: int, top: int, width: int = 4, height: int = 12):
    image[top : top + height, left : left + width] = np.array(RGB[colour]) / 255


def blank(size: int = 32, background: float = 0.0) -> np.ndarray:
    return np.full((size, size, 3), background, np.float32)


@pytest.mark.parametrize("background", [0.0, 0.12])
def test_solid_bars_are_found_with_their_colour_and_place(background):
    image = blank(background=background)
    bar(image, "red", 4, 10)
    bar(image, "blue", 22, 14)
    red, blue = sorted(locate(image), key=lambda region: region.x)
    assert (red.colour, blue.colour) == ("red", "blue")
    assert (red.x, red.y) == pytest.approx((6 / 32, 16 / 32), abs=1e-6)
    assert (blue.x, blue.y) == pytest.approx((24 / 32, 20 / 32), abs=1e-6)
    assert (red.width, red.height) == (4 / 32, 12 / 32)


def test_touching_bars_of_two_colours_are_two_regions_and_of_one_colour_one():
    image = blank()
    bar(image, "red", 8, 10)
    bar(image, "green", 12, 10)
    assert sorted(region.colour for region in locate(image)) == ["green", "red"]
    image = blank()
    bar(image, "red", 8, 10)
    bar(image, "red", 12, 10)
    assert [region.colour for region in locate(image)] == ["red"]


def test_parts_with_a_narrow_gap_are_one_digit_and_with_a_wide_one_two():
    for gap, count in ((1, 1), (2, 2)):
        image = blank()
        bar(image, "yellow", 8, 6, height=6)
        bar(image, "yellow", 8, 12 + gap, height=5)
        assert len(locate(image)) == count


def test_dirt_is_ignored():
    image = blank()
    bar(image, "green", 20, 4, 2, 2)
    assert locate(image) == []


def test_what_is_too_large_for_a_digit_is_cut_where_it_is_darker():
    image = blank()
    bar(image, "green", 2, 10)
    bar(image, "green", 20, 10)
    image[15:17, 6:20, 1] = 0.4  # a dim bridge
    assert len(locate(image)) == 2


def test_each_colour_is_nearest_to_its_own_hue():
    for name, degrees in HUES.items():
        assert COLOURS[nearest_colour(np.array([degrees + 8.0, degrees - 8.0]))[0]] == name
    measured, chroma = hue(np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.5, 0.5, 0.5]]))
    assert measured[:3].tolist() == pytest.approx([0, 120, 240])
    assert chroma.tolist() == [1, 1, 1, 0]


def test_the_median_hue_is_on_the_circle():
    assert judge.median_colour(np.array([350.0, 355.0, 5.0, 10.0], np.float32)) == "red"


@pytest.mark.parametrize("size", ["32", "64"])
def test_real_held_out_scenes_are_seen_as_they_were_drawn(scene_judge, size):
    drawn = [scene for _, scene in scenes(Flags(size=size), "coco", True, 150)]
    images = np.stack([scene.pixels for scene in drawn])
    seen = scene_judge.see(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    digits = colours = 0
    for scene, items in zip(drawn, seen, strict=True):
        assert len(items) == len(scene.items)
        for true in scene.items:
            near = min(items, key=lambda i: (i.x - true.x) ** 2 + (i.y - true.y) ** 2)
            assert abs(near.x - true.x) < 0.03
            assert abs(near.y - true.y) < 0.03
            digits += near.digit == true.digit
            colours += near.colour == true.colour
    total = sum(len(scene.items) for scene in drawn)
    assert colours == total
    assert digits > 0.85 * total


def test_blots_and_empty_images_hold_no_digit(scene_judge):
    image = np.zeros((3, 3, 32, 32), np.float32)
    image[1, :, 8:22, 8:22] = 0.9
    image[2, 0] = np.random.default_rng(0).random((32, 32)) > 0.5
    empty, blot, noise = scene_judge.see(torch.from_numpy(image))
    assert empty == []
    assert not [i for i in blot + noise if i.digit >= 0 and i.confidence > 0.8]


# ---- GenEval's tasks on items made by hand


def item(digit: int, colour: str, x: float = 0.5, y: float = 0.5, confidence: float = 0.9) -> Item:
    return Item(digit, colour, x, y, 0.3, 0.4, confidence)


SEVEN_TWO = Caption((Thing(7), Thing(2)))
LEFT = Caption((Thing(7), Thing(2)), "left of")
BOUND = Caption((Thing(7, "red"), Thing(2, "blue")))
RIGHT = [item(7, "red", 0.25), item(2, "blue", 0.75)]
SWAPPED = [item(7, "red", 0.75), item(2, "blue", 0.25)]
CROSSED = [item(7, "blue", 0.25), item(2, "red", 0.75)]


@pytest.mark.parametrize(
    ("task", "prompt", "items", "right"),
    [
        ("single", Caption((Thing(7, "red"),)), [item(7, "blue")], True),
        ("single", Caption((Thing(7, "red"),)), [item(1, "red")], False),
        ("single", Caption((Thing(7, "red"),)), [item(7, "red", confidence=0.25)], False),
        ("single", Caption((Thing(7, "red"),)), [], False),
        ("colours", Caption((Thing(7, "red"),)), [item(7, "red")], True),
        ("colours", Caption((Thing(7, "red"),)), [item(7, "blue")], False),
        ("colours", Caption((Thing(7, "red"),)), [item(7, "blue"), item(1, "red")], False),
        ("two", SEVEN_TWO, RIGHT, True),
        ("two", SEVEN_TWO, RIGHT[:1], False),
        ("two", SEVEN_TWO, [item(7, "red"), item(3, "red")], False),
        ("counting", Caption((Thing(2, count=2),)), [item(2, "red"), item(2, "red", 0.1)], True),
        ("counting", Caption((Thing(2, count=3),)), [item(2, "red"), item(2, "red", 0.1)], False),
        ("counting", Caption((Thing(2, count=2),)), [item(2, "red")] * 3, False),
        ("position", LEFT, RIGHT, True),
        ("position", LEFT, SWAPPED, False),
        ("position", LEFT, RIGHT[:1], False),
        ("attribution", BOUND, RIGHT, True),
        ("attribution", BOUND, SWAPPED, True),
        ("attribution", BOUND, CROSSED, False),
        ("attribution", BOUND, [item(7, "red"), item(2, "green")], False),
    ],
)
def test_genevals_tasks_on_items_of_known_score(task, prompt, items, right):
    assert geneval.is_right(task, prompt, items) is right


def test_prompts_name_held_out_combinations_and_cover_them():
    for task in geneval.TASKS:
        prompts = geneval.prompts(task, 100, seed=1)
        assert len(prompts) == 100
        assert all(is_held_out(prompt.things) for prompt in prompts)
        assert prompts == geneval.prompts(task, 100, seed=1)
    single = {str(p) for p in geneval.prompts("single", 10, seed=1)}
    assert len(single) == 10, "each digit in its held-out colour"
    assert {p.relation for p in geneval.prompts("position", 72, seed=1)} == set(RELATIONS)
