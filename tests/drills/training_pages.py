"""The runbooks of training, executed against the fault that each is about."""

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mdm.checkpoint.checkpoints import Checkpoints
from mdm.train import heartbeat
from mdm.utils import exit_codes
from tests.chaos.encode_job import Job as EncodeJob
from tests.drills.data import small_disk
from tests.drills.drill import Row, Setting
from tests.drills.runbook import execute
from tests.drills.training import DAMAGE, newest_folder
from tests.drills.training_job import (
    ENV,
    Job,
    committed,
    done_note,
    equal,
    losses,
    open_when,
)

TRAIN = {"steps": 24, "checkpoint_every": 5, "snapshots": 0, "keep": 3, "hang_seconds": 6.0}


def training_runbooks(setting: Setting) -> Iterator[Row]:
    """Each page after the fault it is about; the undisturbed run tells whether nothing changed."""
    whole = setting.folder / "whole"
    Job(whole, {"train": TRAIN}).finish()
    for drill in (ended_runs, corrupt_checkpoint, rolling_back, disk_full, lost_node, world_size):
        for row in drill(setting.folder, whole):
            note = f"{row.note}; the whole time of run and page".removeprefix("; ")
            yield replace(row, note=note)
    yield from launch_and_export(setting.folder)


def ended_runs(folder: Path, whole: Path) -> Iterator[Row]:
    """Preemption, a hang, NaN and a spike: the supervisor has done its part, the page looks on."""
    guard = {"window": 4, "skips": 1, "suspects": 0}
    spike = {"poison": {"sample-17": 1e3}, "poison_from": 6, "real": True, "guard": guard}
    for page, extra, step in (
        ("resume_after_preemption.md", {"signal_step": 9, "signal": int(signal.SIGUSR1)}, 0),
        ("hang.md", {"signal_step": 9, "signal": int(signal.SIGSTOP), "signal_ranks": [1]}, 0),
        ("nan.md", {"poison_step": 9, "real": True}, 9),
        ("loss_spike.md", spike, 6),
    ):
        own = folder / page.removesuffix(".md")
        job = Job(own / "run", {"train": TRAIN, "once": str(own / "once")} | extra)
        began = time.monotonic()
        job.finish()
        variables = {"RUN": str(job.run_dir), "PRESET": "demo", "STEP": str(step)}
        execute(page, ENV | variables | {"TRAIN": job.command()})
        # What the guard does with bad numbers is another drill's: `training_numbers`.
        same = step > 0 or equal(whole, job.run_dir)
        yield Row(page, 1, 1, 0, same, time.monotonic() - began)


def stopped(run_dir: Path, step: int) -> Job:
    """A run that was told to stop at about that step, and saved."""
    job = Job(run_dir, {"train": TRAIN, "pace": 0.3})
    job.reach(step)
    job.halt()
    return job


def waiting_run(run_dir: Path, options: dict[str, Any]) -> Job:
    """A run that lives, and waits before step 12 until it is told to stop; later attempts do not.

    A page of commands takes longer than the whole of a small run.
    """
    gate = run_dir.with_name("gate")
    train = options["train"] | {"hang_seconds": 900.0}
    job = Job(run_dir, options | {"train": train, "wait_for": {"12": str(gate)}})
    open_when((run_dir / heartbeat.STOP_FILE).exists, gate)
    job.reach(11)
    return job


def corrupt_checkpoint(folder: Path, whole: Path) -> Iterator[Row]:
    """The newest checkpoint has a flipped bit, and a later save was torn."""
    began, job = time.monotonic(), stopped(folder / "corrupt" / "run", 11)
    damaged = newest_folder(job.run_dir)
    DAMAGE["a bit flipped"](damaged)
    checkpoints = str(job.run_dir / "checkpoints")
    torn = committed(checkpoints) + 1  # where the run stopped depends on how quick it was
    Checkpoints.at(checkpoints).claim(torn)
    said = execute("corrupt_checkpoint.md", ENV | {"RUN": str(job.run_dir), "TRAIN": job.command()})
    held = f"passed over {damaged.name}: rank-00001/ema.0000 has changed" in said
    held = held and f"passed over step-{torn:08d}: it was never committed" in said
    same, lost = equal(whole, job.run_dir), 24 - committed(checkpoints)
    yield Row("corrupt_checkpoint.md", 2, 2 * held, lost, same, time.monotonic() - began)


def rolling_back(folder: Path, whole: Path) -> Iterator[Row]:
    """A living run is told to go back to step 5."""
    began = time.monotonic()
    job = waiting_run(folder / "rolled" / "run", {"train": TRAIN | {"keep": 10}})
    variables = {"RUN": str(job.run_dir), "STEP": "5", "TRAIN": job.command()}
    said = execute("rolling_back.md", ENV | variables)
    held = job.process.wait(60) == exit_codes.HALTED and "goes on from step-00000005" in said
    same = equal(whole, job.run_dir)
    yield Row("rolling_back.md", 1, int(held), 0, same, time.monotonic() - began)


def disk_full(folder: Path, whole: Path) -> Iterator[Row]:
    """The disk has room for two checkpoints and three are to be kept; needs root, for the disk."""
    size = sum(f.stat().st_size + 4096 for f in newest_folder(whole).rglob("*") if f.is_file())
    mount = folder / "disk" / "small"
    mount.mkdir(parents=True)
    at = str(mount / "checkpoints")
    began = time.monotonic()
    with small_disk(mount, size * 5 // 2 // 1024):
        gate = folder / "disk" / "gate"
        train = TRAIN | {"hang_seconds": 900.0, "checkpoints": at}
        job = Job(folder / "disk" / "run", {"train": train, "wait_for": {"17": str(gate)}})
        job.reach(17)
        # It waits before a step while the page makes room, and then goes on to the next save.
        open_when(lambda: len(list(mount.glob("checkpoints/step-*"))) == 1, gate)
        before = committed(at)
        execute("disk_full.md", ENV | {"RUN": str(job.run_dir), "AT": at})
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        job.finish()
        said = job.said()
        held = "step 15 is not saved" in said and "No space left on device" in said
        held = held and committed(at) > before
        torn = list(mount.rglob(".tmp-*"))
        same = equal(whole, job.run_dir)
    spent = time.monotonic() - began
    yield Row("disk full while saving: disk_full.md", 1, int(held), len(torn), same, spent)


def lost_node(folder: Path, whole: Path) -> Iterator[Row]:
    """Of two nodes on this machine one loses its power, and comes back."""
    own = folder / "lost"
    own.mkdir()
    hosts, meet = own / "hosts", own / "meet"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    options = {"train": TRAIN | {"hang_seconds": 60.0}, "pace": 0.3}

    def node(name: str) -> Job:
        flags = ("--hostfile", str(hosts), "--meet", str(meet), "--node", name)
        return Job(own / "run", options, ranks=1, node=flags)

    began = time.monotonic()
    first, second = node("node-a"), node("node-b")
    first.reach(8)
    second.lose_power()
    time.sleep(15)  # until the other node sees its counter stand still
    execute(
        "lost_node.md",
        ENV | {"MEET": str(meet), "RUN": str(first.run_dir), "TRAIN": second.command()},
    )
    first.finish()
    # An attempt that is called before the lost node is known to be lost comes to nothing.
    held = done_note(first.run_dir)["attempts"] == 2
    held = held and json.loads((meet / "attempt.json").read_text())["number"] > 1
    same = equal(whole, first.run_dir)
    yield Row("lost_node.md", 1, int(held), 0, same, time.monotonic() - began)


def world_size(folder: Path, whole: Path) -> Iterator[Row]:
    """A living run of two ranks goes on with three; equal is here the order of the samples."""
    own, options = folder / "ranks", {"train": TRAIN, "global_batch": 12}
    Job(own / "whole", options).finish()
    began = time.monotonic()
    job = waiting_run(own / "run", options)
    command = job.command().replace("--nproc-per-node 2", "--nproc-per-node 3")
    said = execute("change_of_world_size.md", ENV | {"RUN": str(job.run_dir), "TRAIN": command})
    held = job.process.wait(60) == exit_codes.HALTED and "written by 2 ranks and now on 3" in said
    one, other = done_note(own / "whole"), done_note(job.run_dir)
    same = one["order_digest"] == other["order_digest"] and other["world_size"] == 3
    pairs = zip(losses(own / "whole"), losses(job.run_dir), strict=True)
    most = max(abs(a - b) / a for (_, a, _), (_, b, _) in pairs if a and b)
    held = held and most < 2e-2
    note = f"the order of samples is equal, losses within {most:.0e}"
    yield Row("change_of_world_size.md", 1, int(held), 0, same, time.monotonic() - began, note)


def launch_and_export(folder: Path) -> Iterator[Row]:
    """From pictures to a trained model to a drawing: nothing is broken, all is real."""
    own = folder / "launch"
    encode = EncodeJob(own / "raw")
    code, _, stderr = encode.run(str(own / "encoded" / "pictures"))
    assert code == 0, stderr
    flags: dict[str, Any] = {
        "data.sources": "pictures:1",
        "data.global_batch": 8,
        "tokenizer": encode.tokenizer,
        "autoencoder": encode.autoencoder,
        "model.vocab_size": 32,
        "model.n_classes": 4,
        "model.image_height": 2,
        "model.image_width": 2,
        "model.d_model": 32,
        "model.headdim": 16,
        "model.d_state": 8,
        "model.n_layer": 2,
        "model.kernel": "torch",
        "train.steps": 8,
        "train.warmup": 2,
        "train.checkpoint_every": 4,
        "train.snapshots": 0,
        "train.threads": 1,
    }
    words = shlex.join(word for k, v in flags.items() for word in (f"--{k}", str(v)))
    variables = {
        "PRESET": "demo",
        "RANKS": "2",
        "DATA": str(own / "encoded"),
        "RUN": str(own / "run"),
        "FLAGS": words,
        "MLFLOW_TRACKING_URI": f"sqlite:///{own / 'mlflow.db'}",
        "STEP": "8",
        "OUT": str(own / "exported"),
    }
    began = time.monotonic()
    execute("launch.md", ENV | variables)
    yield Row("launch.md", 0, 0, 0, True, time.monotonic() - began, "no fault; all of its blocks")
    began = time.monotonic()
    execute("export_weights.md", ENV | variables)
    live, ours = (own / "run/export", own / "exported")
    same = (live / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    note = "no fault; equal to the export of the run itself"
    yield Row("export_weights.md", 0, 0, 0, same, time.monotonic() - began, note)
