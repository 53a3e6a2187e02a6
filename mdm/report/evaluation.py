"""The evaluation job: load, run the suite, write numbers and image grids, log to MLflow."""

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mdm.config import Config, doc, from_dict
from mdm.evaluate import classifier
from mdm.evaluate.caption import ClassNames
from mdm.evaluate.heldout import counts, load_encoded, load_images, load_prompts
from mdm.evaluate.suite import DemoData, Settings, run_demo, snapshot
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.tokenizer import Tokenizer
from mdm.generate import Generator
from mdm.report import poster
from mdm.report.image_grid import save_sheet, save_sheets
from mdm.storage import join
from mdm.utils import tracking
from mdm.utils.files import load_json, read_json, write_json

SETS = ("digits", "digits-val", "emoji", "emoji-valid")


@dataclass(frozen=True)
class Flags(Settings):
    """Flags of this job."""

    checkpoint: str = doc("runs/demo/train/export", "folder of exported weights")
    suite: str = doc("demo", "demo")
    data: str = doc("s3://mdm-demo/encoded", "folder or s3:// prefix that holds the encoded sets")
    raw: str = doc("runs/demo/data", "folder of the published sets: real images and prompts")
    judge: str = doc("runs/demo/classifier", "folder of the independent classifier")
    tokenizer: str = doc("runs/demo/tokenizer/tokenizer.model", "SentencePiece .model file")
    autoencoder: str = doc("runs/demo/autoencoder", "folder of the frozen autoencoder")
    snapshots: str = doc("", "folder of earlier exports, step-XXXXXXXX each; for grids")
    out: str = doc("runs/demo/evaluation", "folder to write")
    tracking: bool = doc(True, "log to MLflow, below the training run; false: nothing is written")
    prompts: int = doc(8, "dialogues to answer")

    def __post_init__(self) -> None:
        if self.suite != "demo":
            raise ValueError(f"unknown suite {self.suite!r}; choose demo")
        for name in ("n", "steps", "text_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be positive")
        if not (Path(self.checkpoint) / "model.safetensors").is_file():
            raise ValueError(f"--checkpoint {self.checkpoint} holds no model.safetensors")


def load_data(flags: Flags, autoencoder: Autoencoder) -> tuple[DemoData, dict[str, Any]]:
    """What the suite compares with, and what encoding counted, by set."""
    tokenizer, raw = Tokenizer(flags.tokenizer), Path(flags.raw)
    sets, counted = {}, {}
    for name in tqdm(SETS, desc="held-out data", leave=False):
        sets[name], manifest = load_encoded(join(flags.data, name), tokenizer, autoencoder.sha256)
        counted[name] = counts(manifest)
        if manifest.class_names:
            names = ClassNames.parse(manifest.class_names)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([autoencoder.decode(part) for part in torch.split(latents, 250)])

    data = DemoData(
        names=names,
        train=sets["digits"],
        heldout=sets["digits-val"],
        real=load_images("imagenet", raw / "digits", "val", autoencoder.image_size),
        decode=decode,
        others_train=sets["emoji"],
        others_heldout=sets["emoji-valid"],
        prompts=load_prompts(raw / "dialogues", "test", flags.prompts),
    )
    return data, counted


def samples_seen(folder: Path, config: Config) -> int:
    """How many samples the weights in `folder` had seen: by its step's name, or all."""
    step = re.fullmatch(r"step-(\d+)", folder.name)
    return (int(step[1]) if step else config.train.steps) * config.data.global_batch


def read_config(folder: Path) -> Config:
    """The configuration beside exported weights."""
    return from_dict(Config, load_json(folder / "config.json"))


def run(flags: Flags) -> dict[str, Any]:
    """Generate, judge, write; returns what `metrics.json` holds."""
    began, out = time.perf_counter(), Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    autoencoder = Autoencoder.load(flags.autoencoder)

    def generator(folder: Path) -> Generator:
        return Generator.from_pretrained(
            folder,
            tokenizer=flags.tokenizer,
            autoencoder=flags.autoencoder,
            compiled=True,
            precision=flags.precision,
            local_files_only=True,
        )

    export = Path(flags.checkpoint)
    config, model = read_config(export), generator(export)
    judge, _ = classifier.load(Path(flags.judge))
    data, counted = load_data(flags, autoencoder)
    loaded = time.perf_counter()
    settings = Settings(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Settings)})
    result = run_demo(model, judge, data, settings)
    sheets = save_sheets(result.images, out, columns=10)
    wishes = _spread_texts(data)
    shots = []
    for folder in tqdm(snapshots(flags), desc="over training", unit="snapshot"):
        images, accuracy = snapshot(generator(folder), judge, len(data.names), wishes, settings)
        sheet = save_sheet(images, out / f"{folder.name}.png", columns=len(data.names))
        seen = samples_seen(folder, read_config(folder))
        shots.append({"samples_seen": seen, "accuracy": accuracy, "sheet": vars(sheet)})
    seconds = time.perf_counter() - loaded
    drawn = 5 * settings.n
    report = result.metrics | {
        "samples_seen": samples_seen(export, config),
        "seconds": time.perf_counter() - began,
        "samples_per_second": drawn / seconds,
    }
    plain = result.plain() | {
        "sheets": {name: vars(sheet) for name, sheet in sheets.items()},
        "snapshots": shots,
        "settings": vars(settings),
        "samples_seen": report["samples_seen"],
        "counts": counted,
    }
    write_json(out / "evaluation.json", plain)
    poster.draw(sheets, result.labels, out, out / "readme.png")
    write_json(out / "metrics.json", report)
    if flags.tracking:
        log(flags, config, report, shots)
    return report


def snapshots(flags: Flags) -> list[Path]:
    """Exports over training, oldest first."""
    if not flags.snapshots:
        return []
    return sorted(file.parent for file in Path(flags.snapshots).glob("step-*/model.safetensors"))


def _spread_texts(data: DemoData) -> list[str]:
    assert data.others_train is not None
    rows = torch.linspace(0, len(data.others_train) - 1, len(data.names)).long().tolist()
    return [data.others_train.texts[i] for i in rows]


def log(flags: Flags, config: Config, report: dict[str, Any], shots: list[dict[str, Any]]) -> None:
    """A child of the training run: metrics by samples seen, sheets, the plain results."""
    note = read_json(Path(flags.checkpoint).parent / "tracking.json", {"run_id": str})
    metrics = [({"snapshot_accuracy": s["accuracy"]}, s["samples_seen"]) for s in shots]
    numbers = {k: v for k, v in report.items() if k != "samples_seen"}
    tracking.log_result(
        config.experiment,
        "evaluate",
        parent=note.get("run_id", ""),
        params={k: v for k, v in vars(flags).items() if k != "tracking"},
        metrics=[*metrics, (numbers, report["samples_seen"])],
        artifacts={"evaluation": str(Path(flags.out).absolute())},
    )
