"""A supervised training run for drills to disturb, and functions that compare two runs."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from mdm.checkpoint.checkpoints import ASIDE, MARKER, Checkpoints
from mdm.train import heartbeat
from mdm.utils import exit_codes
from tests.helpers import ROOT

JOB = str(ROOT / "tests/distributed/train_job.py")
BIN = Path(sys.executable).parent
ENV = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class Job:
    """A supervised run of the small objective, by default on two ranks of one node.

    It is restarted until it is done, as a scheduler would. `node` holds the supervisor's flags if
    this is one of several nodes with one rank each.
    """

    def __init__(
        self,
        run_dir: Path,
        options: dict[str, Any],
        env: dict[str, str] | None = None,
        ranks: int = 2,
        node: tuple[str, ...] = (),
    ) -> None:
        self.run_dir, self.options, self.env = run_dir, options, env or {}
        self.ranks, self.node = ranks, node
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.log = run_dir.with_suffix(".log").open("a")
        self.process = self._start()

    def arguments(self) -> list[str]:
        """The command line, one argument an item."""
        supervisor = [sys.executable, str(ROOT / "pipelines/supervise.py"), "--backoff", "0.1"]
        launcher = [str(BIN / "torchrun"), "--nproc-per-node", str(self.ranks)]
        if self.node:
            launcher = [str(BIN / "deepspeed"), "--no_local_rank"]
        job = [JOB, str(self.run_dir), json.dumps(self.options)]
        return [*supervisor, "--restarts", "50", *self.node, "--", *launcher, *job]

    def command(self) -> str:
        """The command line as one types it."""
        return shlex.join(self.arguments())

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.arguments(),
            cwd=ROOT,
            env=os.environ | ENV | self.env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        """The output so far."""
        return Path(self.log.name).read_text()

    def done(self) -> bool:
        """Whether the run is done; restarts it if it ended for another reason."""
        code = self.process.poll()
        if code is None or code == exit_codes.DONE:
            return code == exit_codes.DONE
        assert code in (exit_codes.REQUEUE, -signal.SIGKILL), self.output()[-3000:]
        self.process = self._start()
        return False

    def finish(self, seconds: float = 1200) -> None:
        """Wait until the run is done."""
        end = time.monotonic() + seconds
        while not self.done():
            assert time.monotonic() < end, f"not done in {seconds:.0f} s: {self.output()[-3000:]}"
            time.sleep(0.1)
        self.log.close()

    def reach(self, step: int) -> None:
        """Wait until `step` has been taken; it must not be the last step."""
        while self.step() < step:
            assert not self.done(), f"done before step {step} was seen"
            time.sleep(0.05)

    def halt(self) -> None:
        """Create the file STOP, and wait until the run has saved and ended."""
        stop = self.run_dir / heartbeat.STOP_FILE
        stop.touch()
        assert self.process.wait(600) == exit_codes.HALTED, self.output()[-3000:]
        stop.unlink()
        self.log.close()

    def step(self) -> int:
        """The last step in metrics.jsonl; 0 without one."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    def find_process(self, target: str, rng: random.Random) -> psutil.Process | None:
        """A random process of this kind (rank, launcher or supervisor); None if there is none."""
        try:
            supervisor = psutil.Process(self.process.pid)
            if target == "supervisor":
                return supervisor
            children = supervisor.children(recursive=True)
            ranks = [
                p for p in children if JOB in p.cmdline()[1:4] and "torchrun" not in p.cmdline()[1]
            ]
            chosen = ranks if target == "rank" else [p for p in children if p not in ranks]
        except (psutil.Error, IndexError):
            return None
        return rng.choice(chosen) if chosen else None

    def lose_power(self) -> None:
        """Send SIGKILL to the supervisor and all its descendants."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()
        self.log.close()


def open_gate_when(condition: Callable[[], bool], gate: Path) -> None:
    """Return at once; a thread creates `gate`, which a run waits for, once the condition holds."""

    def open_gate() -> None:
        while not condition():
            time.sleep(0.1)
        gate.touch()

    threading.Thread(target=open_gate, daemon=True).start()


def losses(run_dir: Path) -> list[tuple[int, float | None, float]]:
    """Step, loss and gradient norm of every line of metrics.jsonl."""
    rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r["grad_norm"]) for r in rows]


def equal_runs(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same losses and EMA weights, bit for bit."""
    a, b = (load_file(d / "export" / "model.safetensors") for d in (one, other))
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return same and losses(one) == losses(other)


def read_done(run_dir: Path) -> dict[str, Any]:
    """The content of a finished run's done.json."""
    totals: dict[str, Any] = json.loads((run_dir / "done.json").read_text())
    return totals


def newest_committed_step(uri: str) -> int:
    """The step of the newest committed checkpoint; 0 if there is none."""
    records, _ = Checkpoints.at(uri).newest_first()
    return records[0].step if records else 0


def unfinished(uri: str) -> set[str]:
    """Checkpoints that are being written, or whose write was cut off by a kill."""
    checkpoints = Checkpoints.at(uri).contents().items()
    return {name for name, keys in checkpoints if MARKER not in keys and ASIDE not in keys}
