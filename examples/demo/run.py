"""From published data to a report with images: every stage of the demo, each once.

Interrupted anywhere and run again, it goes on: finished stages are skipped, a broken one continues.
`--review` serves the MLflow pages of what it tracked instead.
"""

from mdm.launch.job import job

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from examples.demo.stages import (
    Runner,
    Service,
    Stage,
    StageFailed,
    end_leftovers,
    only_one,
    remove_path,
)
from mdm.config import doc, fingerprint
from mdm.launch.processes import CPU_ENV, die_with_parent, supervised
from mdm.presets import PRESETS
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.files import DamagedFileError

BUCKET = "mdm-demo"
PYTHON = sys.executable


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/demo", "folder for everything the demo writes")
    store: str = doc("s3", "where encoded data lie: s3 (a server on this machine) or file")
    review: bool = doc(False, "serve the MLflow pages of former runs, and do nothing else")
    port: int = doc(5000, "port of the pages")
    ranks: int = doc(2, "training processes")
    tracking: bool = doc(True, "log to MLflow; false: nothing is written for it")
    train_flags: str = doc("", "more flags for the training job, separated by spaces")
    n: int = doc(500, "images of each kind that the evaluation draws")

    def __post_init__(self) -> None:
        if self.store not in ("s3", "file"):
            raise ValueError(f"--store is {self.store!r}; choose s3 or file")


def stages(flags: Flags) -> list[Stage]:
    """The demo's stages in their order."""
    out = flags.out
    preset = PRESETS["demo"]
    data, tokenizer, autoencoder = f"{out}/data", f"{out}/tokenizer", f"{out}/autoencoder"
    encoded = f"s3://{BUCKET}/encoded" if flags.store == "s3" else f"{out}/encoded"
    images = [f"--datasets=imagenet={data}/digits", f"--datasets=journeydb={data}/emoji"]
    texts = [*images, f"--datasets=ultrachat={data}/dialogues"]
    store = ("s3",) if flags.store == "s3" else ()

    def job(name: str, *flags: str) -> tuple[str, ...]:
        return (PYTHON, f"pipelines/{name}.py", *flags)

    def encode(source: str, name: str, split: str, target: str) -> Stage:
        report = f"{out}/reports/encode-{target}.json"
        where = f"{encoded}/{target}"
        command = job(
            "encode",
            *("--dataset", source, "--root", f"{data}/{name}", "--split", split),
            *("--tokenizer", f"{tokenizer}/tokenizer.model", "--autoencoder", autoencoder),
            *("--text_length", str(preset.model.text_length)),
            *("--out", where, "--report", report),
        )
        title = f"Encode {name}, {split}"
        own = () if os.environ.get("RAY_ADDRESS") else ("ray",)
        needs = (*store, *own)  # the store first: Ray's workers have its environment
        return Stage(f"encode-{target}", title, command, (), (where, report), needs, Path(report))

    train = f"{out}/train"
    untracked = () if flags.tracking else ("--no_tracking",)
    launcher = str(Path(PYTHON).parent / "deepspeed")
    return [
        Stage(
            "data",
            "Write the published data sets",
            (PYTHON, "examples/demo/data.py", "--out", data),
            outputs=(data,),
        ),
        Stage(
            "tokenizer",
            "Train the tokenizer",
            job(
                "train_tokenizer",
                *(*texts, "--out", tokenizer),
                *("--vocab_size", str(preset.model.vocab_size)),
            ),
            outputs=(tokenizer,),
        ),
        Stage(
            "autoencoder",
            "Train the autoencoder",
            job(
                "train_autoencoder",
                *(*images, "--out", autoencoder, "--steps", "600"),
            ),
            outputs=(autoencoder,),
            report=Path(autoencoder, "autoencoder.json"),
        ),
        encode("imagenet", "digits", "train", "digits"),
        encode("imagenet", "digits", "val", "digits-val"),
        encode("journeydb", "emoji", "train", "emoji"),
        encode("journeydb", "emoji", "valid", "emoji-valid"),
        encode("ultrachat", "dialogues", "train", "dialogues"),
        Stage(
            "classifier",
            "Train the independent classifier",
            job(
                "train_classifier",
                *("--classes", f"imagenet={data}/digits", "--others", f"journeydb={data}/emoji"),
                *("--autoencoder", autoencoder, "--out", f"{out}/classifier"),
            ),
            outputs=(f"{out}/classifier",),
            report=Path(out, "classifier", "classifier.json"),
        ),
        Stage(
            "train",
            "Train the model",
            (
                *(launcher, "--num_accelerators", str(flags.ranks), "pipelines/pretrain.py"),
                *("--preset", "demo", "--data.root", encoded, "--run_dir", train),
                *("--tokenizer", f"{tokenizer}/tokenizer.model", "--autoencoder", autoencoder),
                *untracked,
                *flags.train_flags.split(),
            ),
            inputs=(fingerprint(preset),),
            outputs=(train,),
            needs=store,
            report=Path(train, "done.json"),
        ),
        Stage(
            "evaluate",
            "Evaluate",
            job(
                "evaluate",
                *("--checkpoint", f"{train}/export", "--snapshots", f"{train}/snapshots"),
                *("--data", encoded, "--raw", data, "--judge", f"{out}/classifier"),
                *("--tokenizer", f"{tokenizer}/tokenizer.model", "--autoencoder", autoencoder),
                *("--n", str(flags.n), "--out", f"{out}/evaluation"),
                *untracked,
            ),
            outputs=(f"{out}/evaluation",),
            needs=store,
            report=Path(out, "evaluation", "metrics.json"),
        ),
    ]


def services(out: Path) -> dict[str, Service]:
    """The servers of the demo, each for the stages that need it."""
    s3 = ("pipelines/s3_server.py", "--dir", str((out / "s3").absolute()), "--bucket", BUCKET)
    aws = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    ray = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    return {
        "s3": Service((PYTHON, *s3), aws),
        "ray": Service((PYTHON, "pipelines/ray_server.py"), ray),
    }


def remove(where: str) -> None:
    """Remove a folder, a file, or everything below an s3:// prefix."""
    if not where.startswith("s3://"):
        remove_path(where)
        return
    from mdm.storage import open_store

    store = open_store(where)
    for key in store.listing():
        store.delete(key)


def table(done: dict[str, dict[str, Any]]) -> str:
    """Seconds and memory of every stage, as lines of text."""
    rows = [f"{'stage':34}{'seconds':>9}{'GiB':>7}{'samples/s':>11}"]
    for marker in done.values():
        rate = marker["report"].get("samples_per_second")
        rows.append(
            f"{marker['title']:34}{marker['seconds']:9.1f}{marker['peak_rss_gib']:7.2f}"
            + (f"{rate:11.0f}" if rate else "")
        )
    total = sum(m["seconds"] for m in done.values())
    peak = max(m["peak_rss_gib"] for m in done.values())
    return "\n".join([*rows, f"{'all':34}{total:9.1f}{peak:7.2f}"])


def run(flags: Flags) -> int:
    """Run what is not finished, then write the report; returns the exit code."""
    out = Path(flags.out)
    markers = out / "stages"
    with only_one(out):
        if left := end_leftovers(markers):
            print(f"ended {left} processes that a killed run had left")
        env = {**CPU_ENV, "PYTHONPATH": os.getcwd()}
        runner = Runner(markers, env, services(out), remove, lambda line: print(line, flush=True))
        todo = stages(flags)
        done = runner.run(todo)
    from examples.demo import report  # needs torch, which the stages' memory should not pay for

    found = report.write(out, [stage.name for stage in todo])
    print(f"\n{table(done)}\n")
    for metric, ok in found["targets"].items():
        print(f"{'reached' if ok else 'MISSED ':8}{metric} = {found[metric]:.3f}")
    print(f"\n{out / 'report.json'}\n{out / 'report.html'}")
    return 0


def review(flags: Flags) -> int:
    """Serve the MLflow pages until interrupted."""
    database = Path("runs/mlflow.db")
    if not os.environ.get("MLFLOW_TRACKING_URI") and not database.is_file():
        fail(f"{database} does not exist: run `make demo` first")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
    print(f"http://127.0.0.1:{flags.port} (end with Ctrl-C)", flush=True)
    command = [str(Path(PYTHON).parent / "mlflow"), "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(flags.port), "--workers", "1"]
    server = supervised(command, env={"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"})
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.send_signal(signal.SIGTERM)
        server.wait()
        return 0


@job("demo")
def main() -> int:
    """Run the demo, or the review."""
    flags = parse_cli(Flags, description=__doc__ or "")
    parent = psutil.Process().parent()
    if parent is not None and parent.name() == "make":
        die_with_parent(signal.SIGTERM)  # a killed make must not leave this running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if flags.review:
        return review(flags)
    began = time.monotonic()
    try:
        return run(flags)
    except DamagedFileError as error:  # the report needs it
        print(
            f"{error}; remove it and the record of its stage in {flags.out}/stages, then run it "
            "again",
            file=sys.stderr,
        )
        return 1
    except StageFailed as error:
        print(f"{error}; run it again to go on from there", file=sys.stderr)
        return 1
    except BlockingIOError:
        fail(f"another demo is running in {flags.out}")
    except KeyboardInterrupt:
        print(
            f"interrupted after {time.monotonic() - began:.0f} s; run it again to go on",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
