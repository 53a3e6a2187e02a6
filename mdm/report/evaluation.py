"""The evaluation job: load, run the suite, write numbers and image grids, log to MLflow."""

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mdm.config import Config
from mdm.evaluate import classifier
from mdm.evaluate.caption import ClassNames
from mdm.evaluate.heldout import counts, load_encoded, load_images, load_prompts
from mdm.evaluate.suite import DemoData, Settings, run_demo, snapshot
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.tokenizer import Tokenizer
from mdm.generate import Generator
from mdm.report.image_grid import save_sheet, save_sheets
from mdm.storage import join
from mdm.utils import tracking
from mdm.utils.fields import doc, one_of
from mdm.utils.files import load_json, read_json, write_json
from mdm.utils.saved_config import from_dict

SETS = ("digits", "digits-val")


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
    texts: tuple[str, ...] = doc(
        (), "what the snapshots draw, repeated for each text; the names of the classes if none"
    )

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
    n_classes, snapshots = len(data.names), []
    texts = flags.texts or tuple(names[0] for names in data.names.names)
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
