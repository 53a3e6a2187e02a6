"""A sheet of samples of an export, for the page of a run that still goes on."""

from pathlib import Path
from typing import Any

import torch

from mdm.generate import Generator
from mdm.report.image_grid import save_sheet

STEPS, GUIDANCE = 20, 3.0


def draw_samples(folder: Path, path: Path, n: int) -> dict[str, Any]:
    """Draw `n` images of classes and, below them, `n` with captions, by the export `folder`.

    All snapshots of a run start from the same noise, so that they can be compared.

    Args:
        folder: an export, with its tokenizer; the first stage is the one it names.
        path: the PNG to write: two rows of `n` images.
        n: images a row.

    Returns:
        What each image shows, by row.

    Raises:
        FileNotFoundError: the export is not complete.
        ValueError: the tokenizer or the first stage is not the run's, or cannot be loaded.
    """
    generator = Generator.from_pretrained(folder, local_files_only=True)
    config = generator.config
    classes = [i % config.model.n_classes for i in range(n)]
    how: dict[str, Any] = {"guidance": GUIDANCE, "steps": STEPS, "seed": config.seed}
    images = generator.class_to_image(classes, **how)
    pairs, captions = generator.joint(n, **how)
    save_sheet(torch.cat([images, pairs]), path, columns=n)
    return {"classes": classes, "captions": captions}
