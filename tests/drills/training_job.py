"""A supervised training run that a drill disturbs, and how to compare two of them."""

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
    """A supervised run of the small objective, on two ranks of one node unless told otherwise.

    It is started again for as long as it is not done, as a scheduler does. `node` are the
    supervisor's flags of one of several nodes with a rank each.
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

    def words(self) -> list[str]:
        """Its command."""
        own = [sys.executable, str(ROOT / "pipelines/supervise.py"), "--backoff", "0.1"]
        launcher = [str(BIN / "torchrun"), "--nproc-per-node", str(self.ranks)]
        if self.node:
            launcher = [str(BIN / "deepspeed"), "--no_local_rank"]
        job = [JOB, str(self.run_dir), json.dumps(self.options)]
        return [*own, "--restarts", "50", *self.node, "--", *launcher, *job]

    def command(self) -> str:
        """Its command as one types it."""
        return shlex.join(self.words())

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.words(),
            cwd=ROOT,
            env=os.environ | ENV | self.env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def said(self) -> str:
        """What it printed so far."""
        return Path(self.log.name).read_text()

    def done(self) -> bool:
        """Whether it is done; starts it again where it ended otherwise."""
        code = self.process.poll()
        if code is None or code == exit_codes.DONE:
            return code == exit_codes.DONE
        assert code in (exit_codes.REQUEUE, -signal.SIGKILL), self.said()[-3000:]
        self.process = self._start()
        return False

    def finish(self, seconds: float = 1200) -> None:
        """Wait until it is done."""
        end = time.monotonic() + seconds
        while not self.done():
            assert time.monotonic() < end, f"not done in {seconds:.0f} s: {self.said()[-3000:]}"
            time.sleep(0.1)
        self.log.close()

    def reach(self, step: int) -> None:
        """Wait until that step is taken; it must not be the last one."""
        while self.step() < step:
            assert not self.done(), f"done before step {step} was seen"
            time.sleep(0.05)

    def halt(self) -> None:
        """Have it save and end by the file STOP."""
        stop = self.run_dir / heartbeat.STOP_FILE
        stop.touch()
        assert self.process.wait(600) == exit_codes.HALTED, self.said()[-3000:]
        stop.unlink()
        self.log.close()

    def step(self) -> int:
        """The last step with a line of metrics."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    def find(self, target: str, rng: random.Random) -> psutil.Process | None:
        """One of its processes."""
        try:
            own = psutil.Process(self.process.pid)
            if target == "supervisor":
                return own
            family = own.children(recursive=True)
            ranks = [
                p for p in family if JOB in p.cmdline()[1:4] and "torchrun" not in p.cmdline()[1]
            ]
            chosen = ranks if target == "rank" else [p for p in family if p not in ranks]
        except (psutil.Error, IndexError):
            return None
        return rng.choice(chosen) if chosen else None

    def lose_power(self) -> None:
        """SIGKILL to the supervisor and all that it started."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()
        self.log.close()


def open_when(condition: Callable[[], bool], gate: Path) -> None:
    """Make the file `gate`, which a run waits for, once the condition holds; returns at once."""

    def watch_it() -> None:
        while not condition():
            time.sleep(0.1)
        gate.touch()

    threading.Thread(target=watch_it, daemon=True).start()


def losses(run_dir: Path) -> list[tuple[int, float | None, float]]:
    """Step, loss and norm of every line of metrics."""
    rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r["grad_norm"]) for r in rows]


def equal(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same losses and averaged weights, bit for bit."""
    a, b = (load_file(d / "export" / "model.safetensors") for d in (one, other))
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return same and losses(one) == losses(other)


def done_note(run_dir: Path) -> dict[str, Any]:
    """The totals of a finished run."""
    found: dict[str, Any] = json.loads((run_dir / "done.json").read_text())
    return found


def committed(uri: str) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    records, _ = Checkpoints.at(uri).newest_first()
    return records[0].step if records else 0


def unfinished(uri: str) -> set[str]:
    """The checkpoints that are being written, or were when a rank was killed."""
    found = Checkpoints.at(uri).contents().items()
    return {name for name, keys in found if MARKER not in keys and ASIDE not in keys}
