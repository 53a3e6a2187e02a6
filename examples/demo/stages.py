"""Runs job stages one after the other, each once: skips finished ones and continues broken ones.

A job stage is finished when its marker exists with the fingerprint of what determines its result:
its command, its inputs, and the job stages before it. The marker is written last, atomically. A job
stage that was interrupted runs again in place and continues from its own files. A job stage whose
command has changed starts over without its former output, and so do those after it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mdm.launch.processes import supervised
from mdm.utils import files
from mdm.utils.files import read_json, write_json

GIB = 2**30
_TOTALS = {"fingerprint": str, "seconds": float, "peak_rss_gib": float, "attempts": int}
_USAGE: files.Shape = {**_TOTALS, "processes": list}
_MARKER: files.Shape = {**_TOTALS, "title": str, "command": list, "report": dict}
_PROCESS: files.Shape = {"pid": int, "started": float, "command": list}


@dataclass(frozen=True)
class JobStage:
    """A command, what else determines its result, and what it writes."""

    name: str
    title: str
    command: Sequence[str]
    inputs: Sequence[str] = ()  # values or fingerprints besides the command
    outputs: Sequence[str] = ()  # folders, files or s3:// prefixes, removed when it starts over
    needs: Sequence[str] = ()  # names of the services that must be up
    report: Path | None = None  # JSON that the job writes about itself, copied into the marker
    launcher: Sequence[str] = ()  # begins the command; another number of ranks changes no result

    @property
    def words(self) -> list[str]:
        """The whole command."""
        return [*self.launcher, *self.command]

    def fingerprint(self, before: str) -> str:
        """A hash of what determines the result, after job stages with the fingerprint `before`."""
        parts = [before, self.name, list(self.command), list(self.inputs)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class JobStageError(Exception):
    """A job stage ended with another exit code than 0, or a service did not start."""


@contextlib.contextmanager
def service(command: Sequence[str], names: Sequence[str], env: Mapping[str, str]) -> Iterator[None]:
    """A server that some job stages need: up from the first of them to the last.

    `command`, with `env` added to its environment, prints `export NAME=VALUE` for each of `names`
    once it serves; JobStageError if it does not start. What it exports is in the environment of
    this process, and so in those of job stages and later services.
    """
    process = supervised(command, env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    former = {name: os.environ[name] for name in names if name in os.environ}
    values: dict[str, str] = {}
    try:
        while len(values) < len(names) and (line := process.stdout.readline()):
            name, _, value = line.removeprefix("export ").strip().partition("=")
            values[name] = value
        if values.keys() != set(names):
            raise JobStageError(f"{Path(command[1]).name} did not start")
        os.environ.update(values)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(former)


def _memory(process: psutil.Process) -> int:
    # PSS shares a page fairly among the processes that map it, so that sums over a tree are true.
    try:
        return int(process.memory_full_info().pss)
    except (psutil.AccessDenied, AttributeError):
        return int(process.memory_info().rss)


def _measure_tree() -> tuple[int, list[dict[str, Any]]]:
    """Memory in bytes of this process and all its descendants, and a record of each descendant."""
    here = psutil.Process()
    total, records = _memory(here), []
    for process in here.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            total += _memory(process)
            started, command = process.create_time(), process.cmdline()
            records.append({"pid": process.pid, "started": started, "command": command})
    return total, records


@contextlib.contextmanager
def metered(usage: dict[str, Any], path: Path) -> Iterator[None]:
    """Add the time and memory of the body to `usage`, whose shape is `_USAGE`.

    It is written to `path` every second, so that an attempt that is killed still counts.
    """
    before, begun, stop = usage["seconds"], time.monotonic(), threading.Event()

    def measure() -> None:
        total, usage["processes"] = _measure_tree()
        usage["seconds"] = before + time.monotonic() - begun
        usage["peak_rss_gib"] = max(usage["peak_rss_gib"], total / GIB)
        write_json(path, usage)

    def measure_until_stopped() -> None:
        while not stop.wait(1):
            measure()

    measure()
    thread = threading.Thread(target=measure_until_stopped, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        measure()


def end_leftovers(folder: Path) -> int:
    """End the processes that a killed run recorded in `folder` and left behind; their number.

    A process id may have been given to another program since then: only processes with the recorded
    start time and command line are ended.
    """
    ended = []
    for path in sorted(folder.glob("*.attempt.json")):
        for record in read_json(path, {"processes": list}).get("processes", []):
            if files.mismatch(record, _PROCESS) or record["pid"] < 1:
                continue
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                process = psutil.Process(record["pid"])
                same = abs(process.create_time() - record["started"]) < 0.05
                if same and process.cmdline() == record["command"]:
                    process.kill()
                    ended.append(process)
    psutil.wait_procs(ended, timeout=10)
    return len(ended)


def command(script: str, **flags: object) -> list[str]:
    """The command of a job; a list repeats its flag, True is a flag without a value."""
    words = [sys.executable, script]
    for name, value in flags.items():
        if isinstance(value, list):
            words += [f"--{name}={item}" for item in value]
        elif value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def deepspeed(ranks: int) -> list[str]:
    """What launches the script of a training job, and its flags, on `ranks` processes."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return [str(launcher), "--num_accelerators", str(ranks)]


def encode_stage(
    dataset: str,
    folder: str,
    split: str,
    out: str,
    report: str,
    *,
    needs: Sequence[str],
    near_duplicates: bool = True,
    **flags: object,
) -> JobStage:
    """The job stage that encodes a split of the published set in `folder` to `out`."""
    target = out.rpartition("/")[2]
    words = command(
        "pipelines/encode.py",
        dataset=dataset,
        root=folder,
        split=split,
        **flags,
        out=out,
        report=report,
    )
    words += [] if near_duplicates else ["--no_near_duplicates"]
    title = f"Encode {target}"
    return JobStage(f"encode-{target}", title, words, (), [out, report], needs, Path(report))


def run_supervised(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `command` and return its exit code; none of its processes outlives this one."""
    process = supervised(command, env=env)
    try:
        return process.wait()
    except BaseException:  # an interrupt: pass it on and wait until all processes have ended
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def remove(output: str) -> None:
    """Remove a folder, a file, or everything below an s3:// prefix, if it is there."""
    path = Path(output)
    if output.startswith("s3://"):
        from mdm.storage import open_store

        store = open_store(output)
        for key in store.listing():
            store.delete(key)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Runner:
    """Runs job stages; their markers are in `folder`."""

    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    # Command and exported names of each; `service` serves it.
    services: Mapping[str, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)
    _up: dict[str, contextlib.ExitStack] = field(default_factory=dict, init=False)

    def run(self, stages: Sequence[JobStage]) -> dict[str, dict[str, Any]]:
        """Run what is not finished; returns the content of all markers by job stage.

        Raises JobStageError if a job stage failed; those before it stay finished.
        """
        fingerprint, markers = "", {}
        try:
            for at, stage in enumerate(stages):
                fingerprint = stage.fingerprint(fingerprint)
                marker = read_json(self.folder / f"{stage.name}.json", _MARKER)
                if marker.get("fingerprint") == fingerprint:
                    print(f"= {stage.title}: already finished, {marker['seconds']:.1f} s")
                else:
                    marker = self._run(stage, fingerprint, marker)
                markers[stage.name] = marker
                for name in set(self._up).difference(*(s.needs for s in stages[at + 1 :])):
                    self._up.pop(name).close()
        finally:
            while self._up:
                self._up.popitem()[1].close()
        return markers

    def _run(self, stage: JobStage, fingerprint: str, former: dict[str, Any]) -> dict[str, Any]:
        marker, attempt = (self.folder / f"{stage.name}{end}.json" for end in ("", ".attempt"))
        begun = read_json(attempt, _USAGE)
        for name in stage.needs:
            if name not in self._up:
                self._up[name] = contextlib.ExitStack()
                self._up[name].enter_context(service(*self.services[name], self.env))
        usage: dict[str, Any] = {"seconds": 0.0, "peak_rss_gib": 0.0, "attempts": 0}
        usage["fingerprint"] = fingerprint
        if begun.get("fingerprint") == fingerprint:
            usage = begun
            state = f": continues after {usage['seconds']:.1f} s"
        elif not begun and not former and (attempt.exists() or marker.exists()):
            # The output may be this job stage's own, so it is not removed.
            state = ": its record is damaged; continues with the output that is there"
        else:
            state = ": changed, starts over" if begun or marker.exists() else ""
            files.set_folder_aside(marker)
            marker.unlink(missing_ok=True)
            for output in stage.outputs:
                remove(output)
        print(f"> {stage.title}{state}")
        usage["attempts"] += 1
        with metered(usage, attempt):
            code = run_supervised(stage.words, self.env)
        if code != 0:
            raise JobStageError(f"{stage.title} failed: {stage.name} ended with exit code {code}")
        content = {name: usage[name] for name in _TOTALS} | {
            "title": stage.title,
            "command": stage.words,
            "report": read_json(stage.report) if stage.report else {},
        }
        write_json(marker, content)
        attempt.unlink()
        print(f"+ {stage.title}: {usage['seconds']:.1f} s, at most {usage['peak_rss_gib']:.2f} GiB")
        return content
