"""One image of a model's results: digits of every class, named images, images with captions."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mdm.evaluate.suite import Label
from mdm.report.image_grid import Sheet, cut_sheet

TILE, GAP, COLUMNS = 72, 8, 10
TITLE, CAPTION = 26, 30  # height of a title and of a tile's caption in pixels
INK, GREY = (25, 25, 30), (110, 110, 118)
SECTIONS = (  # title, sheet and rows
    ("class to image", "class_to_image", 3),
    ("text to image", "others_train", 2),
    ("image and text at once, from noise", "joint", 2),
)


def draw(
    sheets: Mapping[str, Sheet], labels: Mapping[str, Sequence[Label]], folder: Path
) -> Image.Image:
    """The poster of the `sheets` in `folder` that have a section."""
    captions = {name: [label.text for label in row] for name, row in labels.items()}
    heights = {name: TILE + GAP + CAPTION * any(row) for name, row in captions.items()}
    height = sum(TITLE + rows * heights[name] for _, name, rows in SECTIONS)
    canvas = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, height + GAP), "white")
    pen, y = ImageDraw.Draw(canvas), 0
    small, large = ImageFont.load_default(10), ImageFont.load_default(14)
    for title, name, rows in SECTIONS:
        pen.text((GAP, y + 6), title, fill=INK, font=large)
        row_height = heights[name]
        for i, tile in enumerate(cut_sheet(sheets[name], folder)[: rows * COLUMNS]):
            left, top = GAP + i % COLUMNS * (TILE + GAP), y + TITLE + i // COLUMNS * row_height
            canvas.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
            if i < len(captions[name]) and row_height > TILE + GAP:
                lines = textwrap.wrap(captions[name][i], 14)[:2] or ["(no text)"]
                pen.text((left, top + TILE + 2), "\n".join(lines), fill=GREY, font=small)
        y += TITLE + rows * row_height
    return canvas
