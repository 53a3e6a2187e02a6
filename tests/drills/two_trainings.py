"""Start a second training on a live run, at random times: it is refused, the first unaffected."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mdm.checkpoint.checkpoints import Checkpoints
from mdm.storage.server import S3Server
from mdm.train.writer import RUN_LEASE
from mdm.utils import exit_codes
from tests.drills.drill import Row, Setting
from tests.drills.training_job import ENV, JOB, equal_runs
from tests.faults.faults import environment
from tests.helpers import ROOT

ROUNDS = 20
TRAIN = {"steps": 16, "checkpoint_every": 3, "snapshots": 1}
PAUSE_STEP = "14"  # the first job waits before this step until the second has ended
KINDS = [*itertools.product(("run folder", "checkpoints"), ("disk", "S3"), ("auto", "none"))]


def start(run_dir: Path, options: dict[str, Any]) -> "subprocess.Popen[str]":
    """Start a training on one rank, without a supervisor."""
    return subprocess.Popen(
        [sys.executable, JOB, str(run_dir), json.dumps(options)],
        cwd=ROOT,
        env=os.environ | ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two_trainings(setting: Setting) -> Iterator[Row]:
    """Start `rounds` second jobs, at most 20.

    They resume or start over, on the folder of a live run or only on its checkpoints, which are in
    a folder or on S3.
    """
    undisturbed = setting.folder / "whole"
    process = start(undisturbed, {"train": TRAIN})
    output, _ = process.communicate(timeout=900)
    assert process.returncode == exit_codes.DONE, output
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(setting.folder / "s3", bucket="drill"))
        stack.enter_context(environment(server.env))
        results: dict[str, list[tuple[bool, bool]]] = {}
        for number in range(min(setting.rounds, ROUNDS)):
            shared, store, resume = KINDS[number % len(KINDS)]
            folder = setting.folder / f"round-{number}"
            uri = f"s3://drill/round-{number}" if store == "S3" else str(folder / "saved")
            only_checkpoints = shared == "checkpoints"
            result = second_job(setting, folder, uri, only_checkpoints, resume, undisturbed)
            results.setdefault(f"second training, {shared}, {store}", []).append(result)
        for fault, rounds in results.items():
            refused = sum(r for r, _ in rounds)
            yield Row(fault, len(rounds), refused, 0, all(same for _, same in rounds), 0.0)


def second_job(
    setting: Setting, folder: Path, uri: str, elsewhere: bool, resume: str, undisturbed: Path
) -> tuple[bool, bool]:
    """Run a first job, and a second one while it is alive.

    Returns whether the second was refused with a line that names the first, and whether the first
    equals the run in `undisturbed` bit for bit.
    """
    first_dir, gate, go = folder / "run", folder / "gate", folder / "go"
    folder.mkdir()
    train = TRAIN | {"checkpoints": uri}
    pace = {"pace": 0.2, "wait_for": {PAUSE_STEP: str(gate)}}
    first = start(first_dir, {"train": train} | pace)
    second_dir = folder / "other" if elsewhere else first_dir
    second = start(second_dir, {"train": train, "resume": resume, "begin_when": str(go)})
    while not (first_dir / RUN_LEASE).exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    time.sleep(setting.random(f"two_trainings {folder.name}").uniform(0, 4))
    go.touch()
    second_output, _ = second.communicate(timeout=300)
    lines = [x for x in second_output.splitlines() if "is being written by another job" in x]
    refused = second.returncode == exit_codes.MISTAKE and len(lines) == 1
    refused = refused and f"(process {first.pid} on " in lines[0]
    refused = refused and "Traceback" not in second_output
    refused = refused and not (elsewhere and second_dir.exists())
    gate.touch()
    first_output, _ = first.communicate(timeout=300)
    assert first.returncode == exit_codes.DONE, first_output
    assert refused, second_output
    attempts = [event for event, _ in events(first_dir) if event == "started"]
    same = equal_runs(undisturbed, first_dir) and len(attempts) == 1
    same = same and events(first_dir) == events(undisturbed)
    return refused, same and saved(uri) == saved(str(undisturbed / "checkpoints"))


def events(run_dir: Path) -> list[tuple[str, int]]:
    """The events of a run without their times.

    Saves are left out: if two finish before they are logged, only the second one is.
    """
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [(row["event"], row["step"]) for row in rows if row["event"] != "saved"]


def saved(uri: str) -> dict[str, Any]:
    """The objects in the place of a run's checkpoints: keys, sizes and hashes."""
    checkpoints = Checkpoints.at(uri)
    hashes = {record.name: record.files for record in checkpoints.newest_first()[0]}
    return {"keys": sorted(checkpoints.store.listing()), "hashes": hashes}
