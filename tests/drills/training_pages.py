"""Executes the runbooks of training, each after the fault it is about."""

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
from tests.drills.data import small_disk
from tests.drills.drill import Row, Setting
from tests.drills.runbook import execute
from tests.drills.training import DAMAGE, newest_folder
from tests.drills.training_job import (
    ENV,
    Job,
    equal_runs,
    losses,
    newest_committed_step,
    open_gate_when,
    read_done,
)
from tests.faults.encode_job import Job as EncodeJob

TRAIN = {"steps": 24, "checkpoint_every": 5, "snapshots": 0, "keep": 3, "hang_seconds": 6.0}


def training_runbooks(setting: Setting) -> Iterator[Row]:
    """Execute each page after its fault, and compare the run with an undisturbed one."""
    undisturbed = setting.folder / "whole"
    Job(undisturbed, {"train": TRAIN}).finish()
    for drill in (ended_runs, corrupt_checkpoint, rolling_back, disk_full, lost_node, world_size):
        for row in drill(setting.folder, undisturbed):
            note = f"{row.note}; total time of run and page".removeprefix("; ")
            yield replace(row, note=note)
    yield from launch_and_export(setting.folder)


def ended_runs(folder: Path, undisturbed: Path) -> Iterator[Row]:
    """Preemption, a hang, NaN and a spike: the supervisor recovers, and the page only confirms."""
    guard = {"window": 4, "skips": 1, "suspects": 0}
    spike = {"poison": {"sample-17": 1e3}, "poison_from": 6, "real": True, "guard": guard}
    for page, fault, step in (
        ("resume_after_preemption.md", {"signal_step": 9, "signal": int(signal.SIGUSR1)}, 0),
        ("hang.md", {"signal_step": 9, "signal": int(signal.SIGSTOP), "signal_ranks": [1]}, 0),
        ("nan.md", {"poison_step": 9, "real": True}, 9),
        ("loss_spike.md", spike, 6),
    ):
        page_folder = folder / page.removesuffix(".md")
        once = {"once": str(page_folder / "once")}
        job = Job(page_folder / "run", {"train": TRAIN} | once | fault)
        began = time.monotonic()
        job.finish()
        variables = {"RUN": str(job.run_dir), "PRESET": "demo", "STEP": str(step)}
        execute(page, ENV | variables | {"TRAIN": job.command()})
        # The guard skips steps, so these runs differ; the drill `training_numbers` compares them.
        same = step > 0 or equal_runs(undisturbed, job.run_dir)
        yield Row(page, 1, 1, 0, same, time.monotonic() - began)


def stopped_run(run_dir: Path, step: int) -> Job:
    """A run that was stopped at about this step, after saving."""
    job = Job(run_dir, {"train": TRAIN, "pace": 0.3})
    job.reach(step)
    job.halt()
    return job


def paused_run(run_dir: Path, options: dict[str, Any]) -> Job:
    """A live run that pauses before step 12 until it is asked to stop; later attempts do not pause.

    Without the pause, the small run would end before the commands of a page have run.
    """
    gate = run_dir.with_name("gate")
    train = options["train"] | {"hang_seconds": 900.0}
    job = Job(run_dir, options | {"train": train, "wait_for": {"12": str(gate)}})
    open_gate_when((run_dir / heartbeat.STOP_FILE).exists, gate)
    job.reach(11)
    return job


def corrupt_checkpoint(folder: Path, undisturbed: Path) -> Iterator[Row]:
    """The newest checkpoint has a flipped bit, and a later save was torn."""
    began, job = time.monotonic(), stopped_run(folder / "corrupt" / "run", 11)
    damaged = newest_folder(job.run_dir)
    DAMAGE["a bit flipped"](damaged)
    checkpoints = str(job.run_dir / "checkpoints")
    torn = newest_committed_step(checkpoints) + 1  # the step at which the run stopped varies
    Checkpoints.at(checkpoints).claim(torn)
    variables = {"RUN": str(job.run_dir), "TRAIN": job.command()}
    output = execute("corrupt_checkpoint.md", ENV | variables)
    survived = f"skipped {damaged.name}: rank-00001/ema.0000 has changed" in output
    survived = survived and f"skipped step-{torn:08d}: it was never committed" in output
    same, lost = equal_runs(undisturbed, job.run_dir), 24 - newest_committed_step(checkpoints)
    yield Row("corrupt_checkpoint.md", 2, 2 * survived, lost, same, time.monotonic() - began)


def rolling_back(folder: Path, undisturbed: Path) -> Iterator[Row]:
    """Roll a live run back to step 5."""
    began = time.monotonic()
    job = paused_run(folder / "rolled" / "run", {"train": TRAIN | {"keep": 10}})
    variables = {"RUN": str(job.run_dir), "STEP": "5", "TRAIN": job.command()}
    output = execute("rolling_back.md", ENV | variables)
    survived = (
        job.process.wait(60) == exit_codes.HALTED and "continues from step-00000005" in output
    )
    same = equal_runs(undisturbed, job.run_dir)
    yield Row("rolling_back.md", 1, int(survived), 0, same, time.monotonic() - began)


def disk_full(folder: Path, undisturbed: Path) -> Iterator[Row]:
    """A disk with room for two checkpoints, of which three are to be kept; needs root to mount."""
    files = [f for f in newest_folder(undisturbed).rglob("*") if f.is_file()]
    size = sum(f.stat().st_size + 4096 for f in files)
    mount = folder / "disk" / "small"
    mount.mkdir(parents=True)
    at = str(mount / "checkpoints")
    began = time.monotonic()
    with small_disk(mount, size * 5 // 2 // 1024):
        gate = folder / "disk" / "gate"
        train = TRAIN | {"hang_seconds": 900.0, "checkpoints": at}
        job = Job(folder / "disk" / "run", {"train": train, "wait_for": {"17": str(gate)}})
        job.reach(17)
        # The run pauses before a step while the page frees space, then continues to its next save.
        open_gate_when(lambda: len(list(mount.glob("checkpoints/step-*"))) == 1, gate)
        before = newest_committed_step(at)
        execute("disk_full.md", ENV | {"RUN": str(job.run_dir), "AT": at})
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        job.finish()
        output = job.output()
        survived = "step 15 is not saved" in output and "No space left on device" in output
        survived = survived and newest_committed_step(at) > before
        torn = list(mount.rglob(".tmp-*"))
        same = equal_runs(undisturbed, job.run_dir)
    spent = time.monotonic() - began
    yield Row("disk full while saving: disk_full.md", 1, int(survived), len(torn), same, spent)


def lost_node(folder: Path, undisturbed: Path) -> Iterator[Row]:
    """One of two nodes on this machine loses power and comes back."""
    lost_folder = folder / "lost"
    lost_folder.mkdir()
    hosts, meet = lost_folder / "hosts", lost_folder / "meet"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    options = {"train": TRAIN | {"hang_seconds": 60.0}, "pace": 0.3}

    def node(name: str) -> Job:
        flags = ("--hostfile", str(hosts), "--rendezvous", str(meet), "--node", name)
        return Job(lost_folder / "run", options, ranks=1, node=flags)

    began = time.monotonic()
    first, second = node("node-a"), node("node-b")
    first.reach(8)
    second.lose_power()
    time.sleep(15)  # until the other node has missed its heartbeat
    execute(
        "lost_node.md",
        ENV | {"RENDEZVOUS": str(meet), "RUN": str(first.run_dir), "TRAIN": second.command()},
    )
    first.finish()
    # An attempt called before the loss is noticed never begins to train, and is not counted.
    survived = read_done(first.run_dir)["attempts"] == 2
    survived = survived and json.loads((meet / "attempt.json").read_text())["number"] > 1
    same = equal_runs(undisturbed, first.run_dir)
    yield Row("lost_node.md", 1, int(survived), 0, same, time.monotonic() - began)


def world_size(folder: Path, undisturbed: Path) -> Iterator[Row]:
    """Resume a run of two ranks on three; here, `bitwise_equal` compares only the sample order."""
    ranks_folder, options = folder / "ranks", {"train": TRAIN, "global_batch": 12}
    two_ranks = ranks_folder / "whole"
    Job(two_ranks, options).finish()
    began = time.monotonic()
    job = paused_run(ranks_folder / "run", options)
    command = job.command().replace("--nproc-per-node 2", "--nproc-per-node 3")
    output = execute("change_of_world_size.md", ENV | {"RUN": str(job.run_dir), "TRAIN": command})
    survived = (
        job.process.wait(60) == exit_codes.HALTED and "written by 2 ranks and now on 3" in output
    )
    one, other = read_done(two_ranks), read_done(job.run_dir)
    same = one["order_digest"] == other["order_digest"] and other["world_size"] == 3
    pairs = zip(losses(two_ranks), losses(job.run_dir), strict=True)
    largest = max(abs(a - b) / a for (_, a, _), (_, b, _) in pairs if a and b)
    survived = survived and largest < 2e-2
    note = f"the sample order is equal, losses differ by at most {largest:.0e}"
    yield Row("change_of_world_size.md", 1, int(survived), 0, same, time.monotonic() - began, note)


def launch_and_export(folder: Path) -> Iterator[Row]:
    """Encode, train, export and generate, without a fault."""
    launch_folder = folder / "launch"
    encode = EncodeJob(launch_folder / "raw")
    code, _, stderr = encode.run(str(launch_folder / "encoded" / "images"))
    assert code == 0, stderr
    flags: dict[str, Any] = {
        "data.sources": "images:1",
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
    arguments = shlex.join(x for name, value in flags.items() for x in (f"--{name}", str(value)))
    variables = {
        "PRESET": "demo",
        "RANKS": "2",
        "DATA": str(launch_folder / "encoded"),
        "RUN": str(launch_folder / "run"),
        "FLAGS": arguments,
        "MLFLOW_TRACKING_URI": f"sqlite:///{launch_folder / 'mlflow.db'}",
        "STEP": "8",
        "OUT": str(launch_folder / "exported"),
    }
    began = time.monotonic()
    execute("launch.md", ENV | variables)
    yield Row("launch.md", 0, 0, 0, True, time.monotonic() - began, "no fault; all blocks ran")
    began = time.monotonic()
    execute("export_weights.md", ENV | variables)
    weights = [launch_folder / name / "model.safetensors" for name in ("run/export", "exported")]
    same = weights[0].read_bytes() == weights[1].read_bytes()
    note = "no fault; equal to the export that the run wrote"
    yield Row("export_weights.md", 0, 0, 0, same, time.monotonic() - began, note)
