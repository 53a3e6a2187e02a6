"""The evaluation job: load, run the suite, write numbers and image grids, log to MLflow."""

import dataclasses
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from mdm.config import Config
from mdm.evaluate import classifier
from mdm.evaluate.caption import ClassNames
from mdm.evaluate.heldout import counts, load_encoded, load_images, load_prompts
from mdm.evaluate.suite import DemoData, Label, Settings, run_demo, snapshot
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.tokenizer import Tokenizer
from mdm.generate import Generator
from mdm.report.image_grid import Sheet, cut_sheet, save_sheet, save_sheets
from mdm.storage import join
from mdm.utils import tracking
from mdm.utils.fields import doc, one_of
from mdm.utils.files import load_json, read_json, write_json
from mdm.utils.saved_config import from_dict

SETS = ("digits", "digits-val", "emoji", "emoji-valid")
# Of the poster, in pixels: a tile, the gap between tiles, a title, and a tile's caption.
TILE, GAP, COLUMNS = 72, 8, 10
TITLE, CAPTION = 26, 30
INK, GREY = (25, 25, 30), (110, 110, 118)
SECTIONS = (  # title, sheet and rows
    ("class to image", "class_to_image", 3),
    ("text to image", "others_train", 2),
    ("image and text at once, from noise", "joint", 2),
)


@dataclass(frozen=True)
class Flags(Settings):
    """Flags of this job."""

    checkpoint: str = doc("runs/demo/train/export", "folder of exported weights")
    suite: str = doc("demo", "what is evaluated", one_of("demo"))
    data: str = doc("s3://mdm-demo/encoded", "folder or s3:// prefix of the encoded sets")
    raw: str = doc("runs/demo/data", "folder of the published sets: real images and prompts")
    judge: str = doc("runs/demo/classifier", "folder of the independent classifier")
    tokenizer: str = doc("runs/demo/tokenizer/tokenizer.model", "SentencePiece .model file")
    autoencoder: str = doc("runs/demo/autoencoder", "folder of the frozen autoencoder")
    snapshots: str = doc("", "folder of earlier exports, step-XXXXXXXX each, to show the progress")
    out: str = doc("runs/demo/evaluation", "folder to write")
    tracking: bool = doc(True, "log to MLflow, below the training run")
    prompts: int = doc(8, "dialogues to answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (Path(self.checkpoint) / "model.safetensors").is_file():
            raise ValueError(f"--checkpoint {self.checkpoint} holds no model.safetensors")


def load_data(flags: Flags, autoencoder: Autoencoder) -> tuple[DemoData, dict[str, Any]]:
    """The real data that the suite compares with, and what encoding counted, by set."""
    tokenizer, raw = Tokenizer(flags.tokenizer), Path(flags.raw)
    sets, counted = {}, {}
    for name in tqdm(SETS, desc="held-out data", leave=False):
        sets[name], manifest = load_encoded(join(flags.data, name), tokenizer, autoencoder.sha256)
        counted[name] = counts(manifest)
        if manifest.class_names:
            names = ClassNames.parse(manifest.class_names)
    data = DemoData(
        names=names,
        train=sets["digits"],
        heldout=sets["digits-val"],
        real=load_images("imagenet", raw / "digits", "val", autoencoder.image_size),
        decode=autoencoder.decode,
        others_train=sets["emoji"],
        others_heldout=sets["emoji-valid"],
        prompts=load_prompts(raw / "dialogues", "test", flags.prompts),
    )
    return data, counted


def samples_seen(export: Path) -> int:
    """The samples that exported weights have seen: up to the step in the folder's name, or all."""
    config = from_dict(Config, load_json(export / "config.json"))
    step = re.fullmatch(r"step-(\d+)", export.name)
    return (int(step[1]) if step else config.train.steps) * config.data.global_batch


def run(flags: Flags) -> dict[str, Any]:
    """Generate, judge and write everything into `--out`; returns the content of `metrics.json`."""
    began, out, export = time.perf_counter(), Path(flags.out), Path(flags.checkpoint)
    out.mkdir(parents=True, exist_ok=True)

    def load(folder: Path) -> Generator:
        return Generator.from_pretrained(
            folder,
            tokenizer=flags.tokenizer,
            autoencoder=flags.autoencoder,
            compiled=True,
            precision=flags.precision,
            local_files_only=True,
        )

    autoencoder, model = Autoencoder.load(flags.autoencoder), load(export)
    judge = classifier.load(Path(flags.judge))
    data, counted = load_data(flags, autoencoder)
    loaded = time.perf_counter()
    settings = Settings(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Settings)})
    result = run_demo(model, judge, data, settings)
    sheets = save_sheets(result.images, out, columns=10)
    n_classes, texts, snapshots = len(data.names), data.others_train.texts, []
    texts = tuple(texts[i] for i in torch.linspace(0, len(texts) - 1, n_classes).long().tolist())
    files = Path(flags.snapshots).glob("step-*/model.safetensors") if flags.snapshots else ()
    for folder in tqdm(sorted(f.parent for f in files), desc="over training", unit="snapshot"):
        images, accuracy = snapshot(load(folder), judge, texts, settings)
        sheet = vars(save_sheet(images, out / f"{folder.name}.png", columns=n_classes))
        seen = samples_seen(folder)
        snapshots.append({"samples_seen": seen, "accuracy": accuracy, "sheet": sheet})
    ended = time.perf_counter()
    report = result.metrics | {
        "samples_seen": samples_seen(export),
        "seconds": ended - began,
        "samples_per_second": 5 * settings.n / (ended - loaded),
    }
    evaluation = result.plain() | {
        "sheets": {name: vars(sheet) for name, sheet in sheets.items()},
        "snapshots": snapshots,
        "settings": vars(settings),
        "samples_seen": report["samples_seen"],
        "counts": counted,
    }
    write_json(out / "evaluation.json", evaluation)
    poster(sheets, result.labels, out).save(out / "readme.png", optimize=True)
    write_json(out / "metrics.json", report)
    if flags.tracking:
        log(flags, report, snapshots)
    return report


def log(flags: Flags, report: dict[str, Any], snapshots: list[dict[str, Any]]) -> None:
    """Log to a child of the training run in MLflow: metrics by samples seen, and all files."""
    export = Path(flags.checkpoint)
    experiment = from_dict(Config, load_json(export / "config.json")).experiment
    training = read_json(export.parent / "tracking.json", {"run_id": str})
    metrics = [({"snapshot_accuracy": s["accuracy"]}, s["samples_seen"]) for s in snapshots]
    numbers = {k: v for k, v in report.items() if k != "samples_seen"}
    tracking.log_result(
        experiment,
        "evaluate",
        parent=training.get("run_id", ""),
        params={k: v for k, v in vars(flags).items() if k != "tracking"},
        metrics=[*metrics, (numbers, report["samples_seen"])],
        artifacts={"evaluation": str(Path(flags.out).absolute())},
    )


def poster(
    sheets: Mapping[str, Sheet], labels: Mapping[str, Sequence[Label]], folder: Path
) -> Image.Image:
    """One image of the results: those of the `sheets` in `folder` that have a section."""
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
