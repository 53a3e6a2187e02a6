"""One image of a demo's results: what the model drew and said, the first of everything.

A text that the judges find wrong is red.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mdm.report.image_grid import Sheet, cut_sheet

# Pixels: a tile, the gap between tiles, a title, and a tile's text of three lines.
TILE, GAP, COLUMNS = 72, 8, 10
TITLE, TEXT = 26, 42
LINE = 14  # characters
INK, GREY, RED = (25, 25, 30), (90, 90, 98), (190, 40, 40)


@dataclass(frozen=True)
class Section:
    """Sheets of an evaluation, `number` tiles of each, side by side below a title."""

    title: str
    sheets: Sequence[str]
    number: int


DIGITS = (Section("class to image", ("class_to_image",), 20),)
SCENES = (
    Section(
        "caption to image: combinations that no training image shows",
        ("colours", "counting", "position", "attribution"),
        5,
    ),
    Section("image to caption", ("captions",), 10),
    Section("image and question to answer", ("answers",), 10),
)
JOINT = (Section("noise to image and caption at once", ("joint",), 10),)
Tile = tuple[Image.Image, Mapping[str, Any]]


def section_tiles(section: Section, folder: Path, content: Mapping[str, Any]) -> list[Tile]:
    """The section's tiles with their labels; `content` describes the sheets in `folder`."""
    tiles = []
    for name in section.sheets:
        images = cut_sheet(Sheet(**content["sheets"][name]), folder)[: section.number]
        tiles += list(zip(images, content["labels"][name], strict=False))
    return tiles


def poster(sections: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    """The titled rows of tiles, each with its text below."""
    heights = [
        TITLE + -(-len(tiles) // COLUMNS) * (TILE + GAP + TEXT * _has_text(tiles))
        for _, tiles in sections
    ]
    canvas = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, sum(heights) + GAP), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    small, large = ImageFont.load_default(10), ImageFont.load_default(14)
    for (title, tiles), height in zip(sections, heights, strict=True):
        pen.text((GAP, top + 5), title, fill=INK, font=large)
        for i, (tile, label) in enumerate(tiles):
            row, column = divmod(i, COLUMNS)
            left = GAP + column * (TILE + GAP)
            y = top + TITLE + row * (TILE + GAP + TEXT * _has_text(tiles))
            canvas.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, y))
            if _has_text(tiles):
                lines = textwrap.wrap(label["text"], LINE)[:3] or ["(no text)"]
                colour = RED if label.get("right") is False else GREY
                pen.text((left, y + TILE + 2), "\n".join(lines), fill=colour, font=small)
        top += height
    return canvas


def _has_text(tiles: Sequence[Tile]) -> bool:
    return any(label["text"] for _, label in tiles)
