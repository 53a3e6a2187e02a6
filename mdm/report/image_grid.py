"""Sheets: many small images in one PNG, which the report cuts into tiles again.

Shapes: n images of H x W pixels, f32 [n, 3, H, W] in [0, 1].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

GAP = 2


@dataclass(frozen=True)
class Sheet:
    """A PNG of `count` tiles of `height` x `width` pixels, with `columns` tiles in a row."""

    file: str
    count: int
    columns: int
    height: int
    width: int


def save_sheet(pixels: Tensor, path: Path, *, columns: int) -> Sheet:
    """Write `pixels` [n >= 1, 3, H, W] as a sheet to `path`."""
    n, _, height, width = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    tiles = (pixels.clamp(0.0, 1.0) * 255.0).round().byte().permute(0, 2, 3, 1).numpy()
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        canvas[y : y + height, x : x + width] = tile
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path, optimize=True)
    return Sheet(path.name, n, columns, height, width)


def save_sheets(images: Mapping[str, Tensor], folder: Path, *, columns: int) -> dict[str, Sheet]:
    """Write each of `images` [n, 3, H, W] as a sheet `NAME.png` into `folder`."""
    return {
        name: save_sheet(pixels, folder / f"{name}.png", columns=columns)
        for name, pixels in images.items()
    }


def cut_sheet(sheet: Sheet, folder: Path) -> list[Image.Image]:
    """The tiles of `sheet`, whose file lies in `folder`."""
    with Image.open(folder / sheet.file) as whole:
        places = (divmod(i, sheet.columns) for i in range(sheet.count))
        corners = ((x * (sheet.width + GAP), y * (sheet.height + GAP)) for y, x in places)
        return [whole.crop((x, y, x + sheet.width, y + sheet.height)) for x, y in corners]
