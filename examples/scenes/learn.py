"""Trains the preset `scenes` on coloured digits, and measures images, captions and answers.

Runs every job stage once: published data, tokenizer, autoencoder, judge, encoding, training,
evaluation. Interrupted anywhere and run again, it continues. Writes `report.json` and
`report.html`; exit code 1 if a target is missed.
"""

from mdm.launch.job import job

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.demo.run import SCENES, SERVICES, TONE_WEIGHT, table
from examples.demo.stages import (
    JobStage,
    JobStageError,
    Runner,
    command,
    deepspeed,
    encode_stage,
    end_leftovers,
)
from mdm.launch.processes import CPU_ENV
from mdm.presets import PRESETS
from mdm.storage.lease import OtherJobError, hold_folder
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.fields import POSITIVE, check_fields, doc, one_of
from mdm.utils.saved_config import fingerprint

TOKEN = 8  # pixels that a token spans, each way


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/learn-scenes", "folder for everything it writes")
    size: str = doc("32", "pixels a side; a token of the model spans 8 x 8", one_of("32", "64"))
    ranks: int = doc(2, "training processes", POSITIVE)
    data_flags: str = doc("", "more flags for the data job, separated by spaces")
    train_flags: str = doc("", "more flags for the training job, separated by spaces")
    evaluate_flags: str = doc("", "more flags for the evaluation, separated by spaces")
    autoencoder_steps: int = doc(2000, "optimizer steps of the autoencoder", POSITIVE)

    def __post_init__(self) -> None:
        check_fields(self)


def stages(flags: Flags) -> list[JobStage]:
    """The job stages in their order."""
    out, preset = flags.out, PRESETS["scenes"]
    data, judge, run_dir = f"{out}/data", f"{out}/judge", f"{out}/train"
    tokenizer, autoencoder = f"{out}/tokenizer", f"{out}/autoencoder"
    first_stage = {"tokenizer": f"{tokenizer}/tokenizer.model", "autoencoder": autoencoder}
    named = [f"{name}={data}/{folder}" for name, folder in SCENES.items()]

    def stage(name: str, title: str, words: list[str], out: str, report: str = "") -> JobStage:
        trains = name == "train"
        return JobStage(
            name,
            title,
            words,
            [fingerprint(preset)] if trains else [],
            [out],
            report=Path(out, report) if report else None,
            launcher=deepspeed(flags.ranks) if trains else (),
        )

    def encode(name: str, folder: str) -> JobStage:
        return encode_stage(
            name,
            f"{data}/{folder}",
            "train",
            f"{out}/encoded/{name}",
            f"{out}/reports/encode-{name}.json",
            needs=("ray",),
            near_duplicates=False,  # many scenes of one caption are alike, and all are wanted
            **first_stage,
            text_length=preset.data.caption_length,
        )

    write_data = command("examples/scenes/data.py", out=data, size=flags.size)
    train_tokenizer = command(
        "pipelines/train_tokenizer.py",
        datasets=[*named, f"ultrachat={data}/dialogues"],
        out=tokenizer,
        vocab_size=preset.model.vocab_size,
        repeats=True,  # whole words for the few that all scenes are described in
    )
    train_vae = command(
        "pipelines/train_autoencoder.py",
        datasets=[item for item in named if not item.startswith("vqav2=")],
        image_size=flags.size,
        out=autoencoder,
        steps=flags.autoencoder_steps,
        tone_weight=TONE_WEIGHT,
    )
    train_judge = command(
        "examples/scenes/train_judge.py", data=data, autoencoder=autoencoder, out=judge
    )
    training = {"preset": "scenes", "data.root": f"{out}/encoded", "run_dir": run_dir}
    side = int(flags.size) // TOKEN
    grid = {"model.image_height": side, "model.image_width": side}
    pretrain = command("pipelines/pretrain.py", **training, **first_stage, **grid)[1:]
    evaluate = command(
        "examples/scenes/evaluate.py",
        checkpoint=f"{run_dir}/export",
        data=data,
        judge=judge,
        autoencoder=autoencoder,
        out=f"{out}/evaluation",
    )
    return [
        stage("data", "Write the published scenes", write_data + flags.data_flags.split(), data),
        stage("tokenizer", "Train the tokenizer", train_tokenizer, tokenizer),
        stage("autoencoder", "Train the autoencoder", train_vae, autoencoder, "autoencoder.json"),
        stage("judge", "Train the judge, measure its ceilings", train_judge, judge, "judge.json"),
        *(encode(name, folder) for name, folder in SCENES.items()),
        stage(
            "train",
            "Train the model",
            pretrain + flags.train_flags.split(),
            run_dir,
            "done.json",
        ),
        stage(
            "evaluate",
            "Evaluate",
            evaluate + flags.evaluate_flags.split(),
            f"{out}/evaluation",
            "metrics.json",
        ),
    ]


@job("learn_scenes", OtherJobError, ValueError)
def main() -> int:
    """Run what is not finished, then write the report; exit code 1 if a target is missed."""
    flags = parse_cli(Flags, description=__doc__ or "")
    out = Path(flags.out)
    with hold_folder(out, "learn_scenes"):
        end_leftovers(out / "stages")
        services = {"ray": (command("pipelines/ray_server.py"), SERVICES["ray"])}
        env = {**CPU_ENV, "PYTHONPATH": os.getcwd()}
        try:
            markers = Runner(out / "stages", env, services).run(stages(flags))
        except JobStageError as error:
            fail(f"learn_scenes: {error}; run it again to continue from there")
    # Imported here: they need torch, whose memory should not count for the job stages.
    from examples.scenes import report
    from mdm.report.page import target_lines

    content = report.write(out, markers)
    print(f"\n{table(markers)}\n\n{target_lines(content)}")
    print(f"\n{out / 'report.json'}\n{out / 'report.html'}")
    return 0 if all(content["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
