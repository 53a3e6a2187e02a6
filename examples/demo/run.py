"""From published data to a report with images: runs every job stage of the demo once.

Interrupted anywhere and run again, it continues: it skips the finished job stages and continues a
broken one. `--review` serves the MLflow pages of what the demo tracked instead.
"""

from mdm.launch.job import job

import io
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from examples.demo.stages import (
    JobStage,
    JobStageError,
    Runner,
    command,
    deepspeed,
    encode_stage,
    end_leftovers,
    run_supervised,
)
from mdm.launch.processes import CPU_ENV, die_with_parent
from mdm.presets import PRESETS
from mdm.storage.lease import OtherJobError, hold_folder
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.fields import check_fields, doc, one_of
from mdm.utils.files import DamagedFileError
from mdm.utils.saved_config import fingerprint

BUCKET = "mdm-demo"
SCENES = {"journeydb": "journeydb", "coco": "coco", "vqav2": "coco", "llava": "llava"}  # folders
AUTOENCODER_STEPS = 1000
TONE_WEIGHT = 16  # of the autoencoder: thin strokes of six hues take more than the usual
GUIDANCE = 1.0  # of images of digits: with more they are surer and less varied
SHOWN = [  # what snapshots of the training are asked to draw
    "a red zero",
    "a yellow one at the top left",
    "a three in green",
    "a blue four",
    "a pink five at the bottom right",
    "two sixes",
    "four green sevens",
    "a red nine left of a blue six",
    "a yellow two above a cyan eight",
    "a pink eight and a green seven",
]
PYTHON = sys.executable
SERVICES = {  # the exported variables of each
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"),
    "ray": ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"),
}


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/demo", "folder for everything the demo writes")
    store: str = doc("s3", "where encoded data lie; s3 is served here", one_of("s3", "file"))
    review: bool = doc(False, "serve the MLflow pages of former runs, and do nothing else")
    port: int = doc(5000, "port of the pages")
    ranks: int = doc(2, "training processes")
    tracking: bool = doc(True, "log to MLflow; false: nothing is written for it")
    train_flags: str = doc("", "more flags for the training job, separated by spaces")
    n: int = doc(300, "images of each kind that the evaluation draws")

    def __post_init__(self) -> None:
        check_fields(self)


def stages(flags: Flags) -> list[JobStage]:
    """The job stages of the demo in their order."""
    out, preset = flags.out, PRESETS["demo"]
    data, tokenizer, autoencoder = f"{out}/data", f"{out}/tokenizer", f"{out}/autoencoder"
    classifier, judge = f"{out}/classifier", f"{out}/judge"
    run_dir, evaluation = f"{out}/train", f"{out}/evaluation"
    encoded = f"s3://{BUCKET}/encoded" if flags.store == "s3" else f"{out}/encoded"
    digits, scenes = f"imagenet={data}/digits", f"journeydb={data}/journeydb"
    named = [f"{name}={data}/{folder}" for name, folder in SCENES.items()]
    first_stage = {"tokenizer": f"{tokenizer}/tokenizer.model", "autoencoder": autoencoder}
    store = ["s3"] if flags.store == "s3" else []
    # The store first: Ray's workers have its environment.
    encoding_needs = store if os.environ.get("RAY_ADDRESS") else [*store, "ray"]
    untracked = {} if flags.tracking else {"no_tracking": True}

    def encode(dataset: str, folder: str, split: str, target: str) -> JobStage:
        # A dialogue beyond its length loses its first turns here, and its reply in the loader.
        alone = dataset == "ultrachat"
        return encode_stage(
            dataset,
            f"{data}/{folder}",
            split,
            f"{encoded}/{target}",
            f"{out}/reports/encode-{target}.json",
            needs=encoding_needs,
            near_duplicates=dataset not in SCENES,  # scenes of one caption are alike, all wanted
            **first_stage,
            text_length=preset.data.dialogue_length if alone else preset.data.caption_length,
        )

    def stage(name: str, title: str, words: list[str], out: str, report: str = "") -> JobStage:
        needs = store if name in ("train", "evaluate") else []
        inputs = [fingerprint(preset)] if name == "train" else []
        path = Path(out, report) if report else None
        launcher = deepspeed(flags.ranks) if name == "train" else ()
        return JobStage(name, title, words, inputs, [out], needs, path, launcher)

    write_data = command("examples/demo/data.py", out=data)
    train_tokenizer = command(
        "pipelines/train_tokenizer.py",
        datasets=[digits, *named, f"ultrachat={data}/dialogues"],
        out=tokenizer,
        vocab_size=preset.model.vocab_size,
        repeats=True,  # whole words for the few that all scenes are described in
    )
    train_vae = command(
        "pipelines/train_autoencoder.py",
        datasets=[digits, *(item for item in named if not item.startswith("vqav2="))],
        out=autoencoder,
        steps=AUTOENCODER_STEPS,
        tone_weight=TONE_WEIGHT,
    )
    classes = {"classes": digits, "others": scenes}
    train_classifier = command(
        "pipelines/train_classifier.py",
        **classes,
        autoencoder=autoencoder,
        out=classifier,
        epochs=4,
    )
    seen = {"data": data, "autoencoder": autoencoder}
    train_judge = command("examples/scenes/train_judge.py", **seen, out=judge)
    training = {"preset": "demo", "data.root": encoded, "run_dir": run_dir}
    pretrain = command("pipelines/pretrain.py", **training, **first_stage, **untracked)[1:]
    train = [*pretrain, *flags.train_flags.split()]
    weights = {"checkpoint": f"{run_dir}/export", "snapshots": f"{run_dir}/snapshots"}
    real = {"data": encoded, "raw": data, "judge": classifier}
    evaluate = command(
        "pipelines/evaluate.py",
        **weights,
        **real,
        **first_stage,
        n=flags.n,
        guidance=GUIDANCE,
        joint_guidance=GUIDANCE,
        texts=SHOWN,
        out=evaluation,
        **untracked,
    )
    evaluate_scenes = command(
        "examples/scenes/evaluate.py",
        checkpoint=f"{run_dir}/export",
        **seen,
        judge=judge,
        out=f"{out}/scenes",
        no_joint=True,  # the other evaluation has it
    )
    return [
        stage("data", "Write the published data sets", write_data, data),
        stage("tokenizer", "Train the tokenizer", train_tokenizer, tokenizer),
        stage("autoencoder", "Train the autoencoder", train_vae, autoencoder, "autoencoder.json"),
        encode("imagenet", "digits", "train", "digits"),
        encode("imagenet", "digits", "val", "digits-val"),
        *(encode(name, folder, "train", name) for name, folder in SCENES.items()),
        encode("ultrachat", "dialogues", "train", "dialogues"),
        stage(
            "classifier",
            "Train the classifier of digits",
            train_classifier,
            classifier,
            "classifier.json",
        ),
        stage("judge", "Train the judge of scenes", train_judge, judge, "judge.json"),
        stage("train", "Train the model", train, run_dir, "done.json"),
        stage("evaluate", "Evaluate digits and dialogues", evaluate, evaluation, "metrics.json"),
        stage("scenes", "Evaluate scenes", evaluate_scenes, f"{out}/scenes", "metrics.json"),
    ]


def table(markers: dict[str, dict[str, Any]]) -> str:
    """Time and memory of every job stage, as lines of text."""
    rows = [f"{'job stage':34}{'seconds':>9}{'GiB':>7}{'samples/s':>11}"]
    for marker in markers.values():
        rate = marker["report"].get("samples_per_second")
        rows.append(
            f"{marker['title']:34}{marker['seconds']:9.1f}{marker['peak_rss_gib']:7.2f}"
            + (f"{rate:11.0f}" if rate else "")
        )
    total = sum(marker["seconds"] for marker in markers.values())
    peak = max(marker["peak_rss_gib"] for marker in markers.values())
    return "\n".join([*rows, f"{'all':34}{total:9.1f}{peak:7.2f}"])


def run(flags: Flags) -> int:
    """Run what is not finished, then write the report; returns the exit code."""
    out = Path(flags.out)
    s3 = command("pipelines/s3_server.py", dir=(out / "s3").absolute(), bucket=BUCKET)
    services = {
        "s3": (s3, SERVICES["s3"]),
        "ray": (command("pipelines/ray_server.py"), SERVICES["ray"]),
    }
    with hold_folder(out, "demo"):
        if ended := end_leftovers(out / "stages"):
            print(f"ended {ended} processes that a killed run had left behind")
        todo = stages(flags)
        env = {**CPU_ENV, "PYTHONPATH": os.getcwd()}
        markers = Runner(out / "stages", env, services).run(todo)
    # Imported here: they need torch, whose memory should not count for the job stages.
    from examples.demo import report
    from mdm.report.page import target_lines

    content = report.write(out, [stage.name for stage in todo])
    print(f"\n{table(markers)}\n\n{target_lines(content)}")
    print(f"\n{out / 'report.json'}\n{out / 'report.html'}")
    return 0


def review(flags: Flags) -> int:
    """Serve the MLflow pages until interrupted."""
    database = Path("runs/mlflow.db")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
    if not os.environ.get("MLFLOW_TRACKING_URI") and not database.is_file():
        fail(f"{database} does not exist: run `make demo` first")
    print(f"http://127.0.0.1:{flags.port} (end with Ctrl-C)")
    server = [str(Path(PYTHON).parent / "mlflow"), "server", "--backend-store-uri", uri]
    server += ["--host", "127.0.0.1", "--port", str(flags.port), "--workers", "1"]
    env = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    try:
        return run_supervised(server, env)
    except KeyboardInterrupt:
        return 0


@job("demo", OtherJobError)
def main() -> int:
    """Run the demo, or the review."""
    flags = parse_cli(Flags, description=__doc__ or "")
    parent = psutil.Process().parent()
    if parent is not None and parent.name() == "make":
        die_with_parent(signal.SIGTERM)  # a killed make must not leave this running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # progress is seen at once, in a pipe too
    began = time.monotonic()
    try:
        return review(flags) if flags.review else run(flags)
    except DamagedFileError as error:  # of a file that the report needs
        message = f"{error}; remove it and the marker of its job stage in {flags.out}/stages"
        print(f"{message}, then run the demo again", file=sys.stderr)
        return 1
    except JobStageError as error:
        print(f"{error}; run the demo again to continue from there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        seconds = time.monotonic() - began
        print(f"interrupted after {seconds:.0f} s; run it again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
