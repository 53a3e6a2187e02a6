"""Drills of training: signals at random times, bad numbers, damaged checkpoints, outages."""

import itertools
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mdm.checkpoint.checkpoints import MANIFEST, MARKER
from mdm.storage.server import S3Server
from tests.drills.drill import Row, Setting
from tests.drills.runbook import execute
from tests.drills.training_job import (
    ENV,
    Job,
    equal_runs,
    losses,
    newest_committed_step,
    read_done,
    unfinished,
)
from tests.faults.faults import environment
from tests.faults.mlflow_server import MlflowServer
from tests.faults.proxy import FaultProxy

TARGETS = ("rank", "launcher", "supervisor")
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGUSR1")


def timed(run_dir: Path, options: dict[str, Any]) -> float:
    """The seconds that an undisturbed run takes."""
    began = time.monotonic()
    Job(run_dir, options).finish()
    return time.monotonic() - began


def training_signals(setting: Setting) -> Iterator[Row]:
    """Send `rounds` signals to ranks, launcher and supervisor, half of them during a save.

    One run saves to a folder, another to S3. Each receives signals again and again, in turn at
    random times and while a checkpoint is being written or uploaded.
    """
    steps = 40 * -(-setting.rounds // 2)
    common = {"steps": steps, "checkpoint_every": 7, "snapshots": 0, "hang_seconds": 8.0}
    options = {"train": common, "pace": 0.02}
    undisturbed = timed(setting.folder / "whole", options)
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(setting.folder / "s3", bucket="drill"))
        stack.enter_context(environment(server.env))
        half = setting.rounds // 2
        for kind_of_save, uri, rounds in (
            ("a save", str(setting.folder / "saved"), setting.rounds - half),
            ("an upload", "s3://drill/run", half),
        ):
            faults = [(s, t) for s in SIGNALS for t in TARGETS]
            setting.random(kind_of_save).shuffle(faults)
            run_dir = setting.folder / kind_of_save.replace(" ", "-")
            job = Job(run_dir, options | {"train": common | {"checkpoints": uri}, "slow_save": 0.1})
            began, lost = time.monotonic(), 0
            injected, torn = Counter[str](), Counter[str]()
            for n in itertools.count():
                if injected.total() == rounds or job.done():
                    break
                during = "" if n % 2 else kind_of_save
                fault = faults[n % len(faults)]
                result = inject_signal(job, uri, *fault, during=during, setting=setting)
                if result is not None:  # else go on with the next fault
                    name, was_torn, was_lost = result
                    injected[name] += 1
                    torn[name] += was_torn
                    lost += was_lost
            job.finish()
            same = equal_runs(setting.folder / "whole", run_dir)
            seconds = time.monotonic() - began - undisturbed
            goodput = read_done(run_dir)["goodput"]
            for name, count in sorted(injected.items()):
                note = f"{torn[name]} left a torn checkpoint; goodput of its run {goodput:.2f}"
                share = seconds * count / injected.total()
                yield Row(name, count, count, lost, same, share, note)


def inject_signal(
    job: Job, uri: str, name: str, target: str, during: str, setting: Setting
) -> tuple[str, bool, bool] | None:
    """Send one signal; returns None if the run was done already or had no such process.

    Otherwise returns the fault's name, whether it left a torn checkpoint, and whether a committed
    checkpoint is gone.
    """
    before = job.step()
    rng = setting.random(f"{uri} {before} {name} {target}")
    while not job.done() and job.step() <= before + 2:  # let each attempt make progress
        time.sleep(0.05)
    former = unfinished(uri)
    if during:
        while not job.done() and not unfinished(uri) - former:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
    else:
        time.sleep(rng.uniform(0, 1.0))
    process = job.find_process(target, rng)
    if process is None or job.done():
        return None
    newest = newest_committed_step(uri)
    process.send_signal(getattr(signal, name))
    if name == "SIGSTOP" and target != "rank":  # it delays nothing: continue it later
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGCONT)
    time.sleep(2.0)  # by now, a save that was not interrupted is committed
    where = f", in {during}" if during else f", {'S3' if uri.startswith('s3') else 'folder'}"
    return (
        f"{name} of {target}{where}",
        bool(unfinished(uri) - former),
        newest_committed_step(uri) < newest,
    )


def training_numbers(setting: Setting) -> Iterator[Row]:
    """NaN and spikes on one rank, then SIGKILL: the guard repeats its decisions after resuming."""
    common = {"steps": 30, "checkpoint_every": 5, "snapshots": 0}
    for fault, extra in (
        ("NaN on one rank", {"poison_step": 13}),
        ("spikes on one rank", {"poison": {"sample-17": 1e4, "sample-31": 1e4}, "poison_from": 6}),
    ):
        folder = setting.folder / fault.replace(" ", "-")
        options = {"train": common, "guard": {"window": 4, "skips": 1, "suspects": 0}} | extra
        undisturbed = timed(folder / "whole", options)
        kill = {"signal_step": 17, "once": str(folder / "once")}
        began = time.monotonic()
        job = Job(folder / "killed", options | kill)
        job.finish()
        seconds = time.monotonic() - began - undisturbed
        skipped = '"skipped"' in (job.run_dir / "events.jsonl").read_text()
        same = equal_runs(folder / "whole", job.run_dir)
        note = f"and a SIGKILL; goodput {read_done(job.run_dir)['goodput']:.2f}"
        yield Row(fault, 1, int(skipped), 0, same, seconds, note)


def _change(key: str, change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    """A function that changes the bytes of one file of a checkpoint."""

    def damage(checkpoint: Path) -> None:
        data = bytearray((checkpoint / key).read_bytes())
        change(data)
        (checkpoint / key).write_bytes(data)

    return damage


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def halve(data: bytearray) -> None:
    del data[len(data) // 2 :]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit flipped": _change("rank-00001/ema.0000", flip),
    "truncated": _change("rank-00000/weights.0000", halve),
    "a file missing": lambda checkpoint: (checkpoint / "rank-00001/exp_avg.0000").unlink(),
    "never committed": lambda checkpoint: (checkpoint / MARKER).unlink(),
    "manifest torn": _change(MANIFEST, halve),
}


def newest_folder(run_dir: Path) -> Path:
    """The newest checkpoint of a run whose checkpoints are in its folder."""
    return sorted((run_dir / "checkpoints").glob("step-*"))[-1]


def training_damage(setting: Setting) -> Iterator[Row]:
    """Damage the newest checkpoint of a stopped run: it resumes from the one before."""
    train = {"steps": 24, "checkpoint_every": 5, "keep": 3, "snapshots": 0}
    options = {"train": train, "pace": 0.1}
    timed(setting.folder / "whole", options)
    stopped = Job(setting.folder / "stopped", options)
    stopped.reach(11)
    stopped.halt()
    seconds = {}
    for fault, damage in {"": lambda checkpoint: None, **DAMAGE}.items():
        run_dir = setting.folder / f"again-{fault.replace(' ', '-')}"
        shutil.copytree(stopped.run_dir, run_dir)
        name = newest_folder(run_dir).name
        damage(newest_folder(run_dir))
        began = time.monotonic()
        job = Job(run_dir, options)
        job.finish()
        seconds[fault] = time.monotonic() - began
        if fault:
            passed_over = f"skipped {name}" in job.output()
            same = equal_runs(setting.folder / "whole", run_dir)
            lost = seconds[fault] - seconds[""]
            yield Row(f"newest checkpoint: {fault}", 1, int(passed_over), 0, same, lost)


def training_store(setting: Setting) -> Iterator[Row]:
    """An S3 outage in the middle of a run; then a network that corrupts requests."""
    options = {"train": {"steps": 120, "checkpoint_every": 10, "snapshots": 0}, "pace": 0.1}
    undisturbed = timed(setting.folder / "whole", options)
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(setting.folder / "s3", bucket="drill"))
        stack.enter_context(environment(server.env))
        uri = "s3://drill/away"
        began = time.monotonic()
        job = Job(setting.folder / "away", _saving_to(options, uri))
        job.reach(25)
        before = newest_committed_step(uri)
        server.kill()
        job.reach(60)
        server.start()
        job.finish()
        lost = int(newest_committed_step(uri) < before) + 120 - len(losses(job.run_dir))
        same = equal_runs(setting.folder / "whole", job.run_dir)
        finished = newest_committed_step(uri) == 120
        note = f"{job.output().count('is not saved')} saves failed; {_goodput(job)}"
        seconds = time.monotonic() - began - undisturbed
        yield Row("S3 down, in uploads", 1, int(finished), lost, same, seconds, note)

        uri = "s3://drill/corrupted"
        kinds = ("503", "reset", "truncate", "flip")
        with FaultProxy(server.port, 0.1, kinds, setting.seed) as proxy:
            began = time.monotonic()
            env = {"AWS_ENDPOINT_URL": proxy.endpoint}
            job = Job(setting.folder / "corrupted", _saving_to(options, uri), env)
            job.finish()
            count = sum(proxy.injected.values())
        lost = 120 - newest_committed_step(uri)
        same = equal_runs(setting.folder / "whole", job.run_dir)
        seconds = time.monotonic() - began - undisturbed
        yield Row("S3 network corrupts 10 %", count, count, lost, same, seconds, _goodput(job))


def _saving_to(options: dict[str, Any], uri: str) -> dict[str, Any]:
    return options | {"train": options["train"] | {"checkpoints": uri}}


def _goodput(job: Job) -> str:
    return f"goodput {read_done(job.run_dir)['goodput']:.2f}"


def tracking_away(setting: Setting) -> Iterator[Row]:
    """Kill the MLflow server in the middle of a run and restart it before the run ends."""
    import mlflow

    options = {"train": {"steps": 120, "checkpoint_every": 20, "snapshots": 0}, "pace": 0.1}
    undisturbed = timed(setting.folder / "whole", options)
    with MlflowServer(setting.folder / "server") as server:
        began = time.monotonic()
        env = {"MLFLOW_TRACKING_URI": server.uri}
        job = Job(setting.folder / "run", options | {"track": True}, env)
        job.reach(20)
        server.kill()
        job.reach(80)
        server.start()
        job.finish()
        seconds = time.monotonic() - began - undisturbed
        execute("mlflow_away.md", ENV | env | {"RUN": str(job.run_dir), "TRAIN": job.command()})
        run_id = json.loads((job.run_dir / "tracking.json").read_text())["run_id"]
        client = mlflow.MlflowClient(tracking_uri=server.uri)
        steps = [m.step for m in client.get_metric_history(run_id, "loss")]
        delivered = sorted(steps) == [8 * (n + 1) for n in range(120)]
        delivered = delivered and client.get_run(run_id).info.status == "FINISHED"
    same, lost = equal_runs(setting.folder / "whole", job.run_dir), 120 - len(set(steps))
    yield Row("MLflow down", 1, int(delivered), lost, same, seconds, _goodput(job))
