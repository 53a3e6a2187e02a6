"""One image that shows what a model makes: digits of every class, named images, pairs."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mdm.evaluate.suite import Label
from mdm.report.image_grid import Sheet, cut_sheet

TILE, GAP, COLUMNS = 72, 8, 10
TITLE, CAPTION = 26, 30  # pixels a title and a tile's caption take
INK, GREY = (25, 25, 30), (110, 110, 118)


def draw(
    sheets: Mapping[str, Sheet], labels: Mapping[str, Sequence[Label]], folder: Path, path: Path
) -> None:
    """Write the poster of `sheets`, whose files lie in `folder`, to `path`."""
    sections = [
        ("class to image", "class_to_image", 3),
        ("text to image", "others_train", 2),
        ("image and text at once, from noise", "joint", 2),
    ]
    present = [(title, name, rows) for title, name, rows in sections if name in sheets]
    heights = [
        TITLE + rows * (TILE + GAP + (CAPTION if _is_captioned(labels.get(name, [])) else 0))
        for _, name, rows in present
    ]
    canvas = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, sum(heights) + GAP), "white")
    pen, y = ImageDraw.Draw(canvas), 0
    small, large = ImageFont.load_default(10), ImageFont.load_default(14)
    for (title, name, rows), height in zip(present, heights, strict=True):
        pen.text((GAP, y + 6), title, fill=INK, font=large)
        row_height = (height - TITLE) // rows
        tiles = cut_sheet(sheets[name], folder)[: rows * COLUMNS]
        for i, tile in enumerate(tiles):
            left = GAP + i % COLUMNS * (TILE + GAP)
            top = y + TITLE + i // COLUMNS * row_height
            canvas.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
            if _is_captioned(labels.get(name, [])) and i < len(labels[name]):
                lines = textwrap.wrap(labels[name][i].text, 14)[:2] or ["(no text)"]
                pen.text((left, top + TILE + 2), "\n".join(lines), fill=GREY, font=small)
        y += height
    canvas.save(path, optimize=True)


def _is_captioned(labels: Sequence[Label]) -> bool:
    return any(label.text for label in labels)
