"""Drills of the training engine: signals at random moments, bad numbers, no tracking server."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from mdm.train import watch
from mdm.train.checkpoint import Checkpoints
from tests.chaos.mlflow_server import MlflowServer
from tests.drills.drill import Row, Setting
from tests.drills.runbook import execute
from tests.helpers import ROOT

JOB = str(ROOT / "tests/distributed/train_job.py")
BIN = Path(sys.executable).parent
TARGETS = ("rank", "launcher", "supervisor")
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGUSR1")
ENV = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def line_of(run_dir: Path, options: dict[str, Any]) -> list[str]:
    """A supervised run of the small objective on two ranks."""
    own = [sys.executable, str(ROOT / "pipelines/supervise.py"), "--backoff", "0.1"]
    launcher = [str(BIN / "torchrun"), "--nproc-per-node", "2", JOB]
    return [*own, "--restarts", "50", "--", *launcher, str(run_dir), json.dumps(options)]


class Job:
    """A supervised run, started again for as long as it is not done, as a scheduler does."""

    def __init__(self, run_dir: Path, options: dict[str, Any], env: dict[str, str] | None = None):
        self.run_dir, self.options, self.env = run_dir, options, env or {}
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.log = run_dir.with_suffix(".log").open("a")
        self.process = self._start()

    def command(self) -> str:
        """Its command as one types it."""
        return shlex.join(line_of(self.run_dir, self.options))

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            line_of(self.run_dir, self.options),
            cwd=ROOT,
            env=os.environ | ENV | self.env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def done(self) -> bool:
        """Whether it is done; starts it again where it ended otherwise."""
        code = self.process.poll()
        if code is None or code == watch.DONE:
            return code == watch.DONE
        said = Path(self.log.name).read_text()[-3000:]
        assert code in (watch.REQUEUE, -signal.SIGKILL), said
        self.process = self._start()
        return False

    def finish(self, seconds: float = 600) -> None:
        """Wait until it is done."""
        end = time.monotonic() + seconds
        while not self.done():
            assert time.monotonic() < end, f"not done in {seconds:.0f} s: see {self.log.name}"
            time.sleep(0.1)
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


def losses(run_dir: Path) -> list[tuple[int, float | None, float]]:
    """Step, loss and norm of every line of metrics."""
    rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r["grad_norm"]) for r in rows]


def equal(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same losses and averaged weights, bit for bit."""
    a, b = (load_file(d / "export" / "model.safetensors") for d in (one, other))
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return same and losses(one) == losses(other)


def committed(run_dir: Path) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    records, _ = Checkpoints.at(str(run_dir / "checkpoints")).newest_first()
    return records[0].step if records else 0


def training_signals(setting: Setting) -> Iterator[Row]:
    """`rounds` signals to ranks, launcher and supervisor at random moments of one run."""
    rng = setting.random("training_signals")
    train = {"steps": 25 * setting.rounds, "checkpoint_every": 7, "snapshots": 0}
    options = {"train": train | {"hang_seconds": 8.0}, "pace": 0.02}
    began = time.monotonic()
    whole = Job(setting.folder / "whole", options)
    whole.finish()
    undisturbed = time.monotonic() - began
    began, injected, lost = time.monotonic(), Counter[str](), 0
    job = Job(setting.folder / "disturbed", options)
    faults = [(s, t) for s in SIGNALS for t in TARGETS]
    for number in range(setting.rounds):
        before = job.step()
        while not job.done() and job.step() <= before + 2:  # each attempt gets somewhere
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.0))
        name, target = faults[number % len(faults)]
        process = job.find(target, rng)
        if process is None or job.done():
            continue
        newest = committed(job.run_dir)
        process.send_signal(getattr(signal, name))
        injected[f"{name} of {target}"] += 1
        if name == "SIGSTOP" and target != "rank":  # it holds nothing up, and goes on later
            time.sleep(rng.uniform(0, 2))
            process.send_signal(signal.SIGCONT)
        lost += committed(job.run_dir) < newest
    job.finish()
    same, seconds = equal(whole.run_dir, job.run_dir), time.monotonic() - began - undisturbed
    goodput = json.loads((job.run_dir / "done.json").read_text())["goodput"]
    for fault, count in sorted(injected.items()):
        share = seconds * count / injected.total()
        yield Row(fault, count, count, lost, same, share, f"goodput {goodput:.2f} of the whole run")


def training_numbers(setting: Setting) -> Iterator[Row]:
    """NaN and spikes on one rank, with a kill right after: the same decisions once more."""
    common = {"steps": 30, "checkpoint_every": 5, "snapshots": 0}
    for fault, extra in (
        ("NaN on one rank", {"poison_step": 13}),
        ("spikes on one rank", {"poison": {"sample-17": 1e4, "sample-31": 1e4}, "poison_from": 6}),
    ):
        folder = setting.folder / fault.replace(" ", "-")
        options = {"train": common, "guard": {"window": 4, "skips": 1, "suspects": 0}} | extra
        whole = Job(folder / "whole", options)
        began = time.monotonic()
        whole.finish()
        undisturbed = time.monotonic() - began
        kill = {"signal_step": 17, "once": str(folder / "once")}
        began = time.monotonic()
        job = Job(folder / "killed", options | kill)
        job.finish()
        seconds = time.monotonic() - began - undisturbed
        events = (job.run_dir / "events.jsonl").read_text()
        held = '"skipped"' in events
        yield Row(
            fault, 1, int(held), 0, equal(whole.run_dir, job.run_dir), seconds, "and a SIGKILL"
        )


def tracking_away(setting: Setting) -> Iterator[Row]:
    """The MLflow server is killed in the middle of a run and comes back before its end."""
    import mlflow

    options = {"train": {"steps": 120, "checkpoint_every": 20, "snapshots": 0}, "pace": 0.1}
    whole = Job(setting.folder / "whole", options)
    began = time.monotonic()
    whole.finish()
    undisturbed = time.monotonic() - began
    with MlflowServer(setting.folder / "server") as server:
        began = time.monotonic()
        env = {"MLFLOW_TRACKING_URI": server.uri}
        job = Job(setting.folder / "run", options | {"track": True}, env)
        while job.step() < 20:
            assert not job.done()
            time.sleep(0.1)
        server.kill()
        while job.step() < 80:
            assert not job.done()
            time.sleep(0.1)
        server.start()
        job.finish()
        seconds = time.monotonic() - began - undisturbed
        execute("mlflow_away.md", ENV | env | {"RUN": str(job.run_dir), "TRAIN": job.command()})
        run_id = json.loads((job.run_dir / "tracking.json").read_text())["run_id"]
        client = mlflow.MlflowClient(tracking_uri=server.uri)
        steps = [m.step for m in client.get_metric_history(run_id, "loss")]
        held = sorted(steps) == [8 * (n + 1) for n in range(120)]
        held = held and client.get_run(run_id).info.status == "FINISHED"
    yield Row(
        "MLflow away",
        1,
        int(held),
        120 - len(set(steps)),
        equal(whole.run_dir, job.run_dir),
        seconds,
    )


def training_runbooks(setting: Setting) -> Iterator[Row]:
    """The pages of preemption, a hang, NaN and a spike, after what they are about."""
    train = {"steps": 24, "checkpoint_every": 5, "snapshots": 0, "hang_seconds": 6.0}
    guard = {"window": 4, "skips": 1, "suspects": 0}
    for page, extra, step in (
        ("resume_after_preemption.md", {"signal_step": 9, "signal": int(signal.SIGUSR1)}, 0),
        ("hang.md", {"signal_step": 9, "signal": int(signal.SIGSTOP), "signal_ranks": [1]}, 0),
        ("nan.md", {"poison_step": 9, "real": True}, 9),
        (
            "loss_spike.md",
            {"poison": {"sample-17": 1e3}, "poison_from": 6, "real": True, "guard": guard},
            6,
        ),
    ):
        folder = setting.folder / page.removesuffix(".md")
        options = {"train": train, "once": str(folder / "once")} | extra
        job = Job(folder / "run", options)
        began = time.monotonic()
        job.finish()
        variables = {"RUN": str(job.run_dir), "PRESET": "demo", "STEP": str(step)}
        execute(page, ENV | variables | {"TRAIN": job.command()})
        yield Row(page, 1, 1, 0, True, time.monotonic() - began, "the whole time of run and page")
