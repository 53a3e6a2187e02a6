from pathlib import Path

import torch

from mdm.report.image_grid import cut_sheet, save_sheet, save_sheets


def test_sheets_give_back_what_was_put_in(tmp_path: Path) -> None:
    pixels = torch.rand(7, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    sheet = save_sheet(pixels, tmp_path / "s.png", columns=3)
    tiles = cut_sheet(sheet, tmp_path)
    assert len(tiles) == 7
    assert tiles[4].size == (5, 4)
    want = (pixels[4, :, 2, 3] * 255).round().int().tolist()
    assert list(tiles[4].getpixel((3, 2))) == want


def test_each_set_of_images_becomes_a_sheet_of_its_name(tmp_path: Path) -> None:
    sheets = save_sheets(
        {"a": torch.rand(3, 3, 4, 4), "b": torch.rand(1, 3, 4, 4)}, tmp_path, columns=2
    )
    assert {name: (sheet.file, sheet.count, sheet.columns) for name, sheet in sheets.items()} == {
        "a": ("a.png", 3, 2),
        "b": ("b.png", 1, 1),
    }
    assert (tmp_path / "b.png").is_file()
