"""Stages run one after the other, each once: finished ones are skipped, broken ones go on.

A stage is finished when its marker exists with the fingerprint of what determines it: its command,
its inputs, and the stages before it. The marker is written last, atomically. A stage that was cut
short runs again in place and goes on from what it left; one whose command changed starts from
nothing, and so do those after it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mdm.launch import processes as children
from mdm.utils import files
from mdm.utils.files import read_json, write_json

GIB = 2**30
_MARKER: files.Shape = {
    **{"fingerprint": str, "title": str, "command": list, "seconds": float},
    **{"peak_rss_gib": float, "attempts": int, "report": dict},
}
_USAGE: files.Shape = {
    **{"fingerprint": str, "seconds": float, "peak_rss_gib": float},
    **{"attempts": int, "processes": list},
}
_PROCESS: files.Shape = {"pid": int, "started": float, "command": list}


@dataclass(frozen=True)
class Stage:
    """One job: `command`, what else determines its result, and what it writes."""

    name: str
    title: str
    command: tuple[str, ...]
    inputs: tuple[str, ...] = ()  # values or fingerprints beside the command
    outputs: tuple[str, ...] = ()  # folders, files or s3:// prefixes, removed before a changed redo
    needs: tuple[str, ...] = ()  # names of the services that must be up
    report: Path | None = None  # JSON that the job writes about itself, kept in the marker


class StageFailed(Exception):
    """A stage ended with another exit code than 0, or a service did not start."""


class Service:
    """A server that some stages need: up from the first of them to the last.

    `command` prints `export NAME=VALUE` for each of `names` once it serves. These are in this
    process's environment, and so in those of stages and later services, until it ends.
    """

    def __init__(self, command: Sequence[str], names: Sequence[str]) -> None:
        self._command, self._names = tuple(command), tuple(names)
        self._former: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self, env: Mapping[str, str]) -> None:
        """Bring it up, unless it is; `env` adds to its environment. StageFailed if it fails."""
        if self._process is not None:
            return
        self._process = children.supervised(self._command, env=env, stdout=subprocess.PIPE)
        values: dict[str, str] = {}
        assert self._process.stdout is not None
        while len(values) < len(self._names) and (line := self._process.stdout.readline()):
            name, _, value = line.removeprefix("export ").strip().partition("=")
            values[name] = value
        if values.keys() != set(self._names):
            self.stop()
            raise StageFailed(f"{Path(self._command[1]).name} did not start")
        self._former = {name: os.environ[name] for name in self._names if name in os.environ}
        os.environ.update(values)

    def stop(self) -> None:
        """End it, if it is up."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        for name in self._names:
            os.environ.pop(name, None)
        os.environ.update(self._former)


@dataclass
class Usage:
    """What a stage has taken so far, over all attempts."""

    fingerprint: str
    seconds: float = 0.0
    peak_rss_gib: float = 0.0
    attempts: int = 0
    processes: list[dict[str, Any]] = field(default_factory=list)


def _memory(process: psutil.Process) -> int:
    # PSS shares a page fairly among the processes that map it, so that sums over a tree are true.
    try:
        return int(process.memory_full_info().pss)
    except (psutil.AccessDenied, AttributeError):
        return int(process.memory_info().rss)


def _tree() -> tuple[int, list[dict[str, Any]]]:
    """Memory of this process and all below it, bytes, and who those below are."""
    here, total, below = psutil.Process(), 0, []
    for process in [here, *here.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            total += _memory(process)
            if process.pid != here.pid:
                below.append(
                    {
                        "pid": process.pid,
                        "started": process.create_time(),
                        "command": process.cmdline(),
                    }
                )
    return total, below


@contextlib.contextmanager
def metered(usage: Usage, path: Path, every: float = 3.0) -> Iterator[None]:
    """Add time and memory to `usage` and keep it in `path` while the body runs.

    The file is renewed all the time, so that an attempt that is killed still counts.
    """
    before, begun, stop = usage.seconds, time.monotonic(), threading.Event()

    def note() -> None:
        total, usage.processes = _tree()
        usage.seconds = before + time.monotonic() - begun
        usage.peak_rss_gib = max(usage.peak_rss_gib, total / GIB)
        write_json(path, vars(usage))

    def keep_noting() -> None:
        while not stop.wait(every):
            note()

    note()
    thread = threading.Thread(target=keep_noting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        note()


def end_leftovers(folder: Path) -> int:
    """End processes that a killed run recorded in `folder` and left behind; how many there were.

    A process id may have been given to another program since: only one with the recorded start
    time and command line is ended.
    """
    ours = []
    for path in sorted(folder.glob("*.attempt.json")):
        for recorded in read_json(path, {"processes": list}).get("processes", []):
            if files.mismatch(recorded, _PROCESS) or recorded["pid"] < 1:
                continue
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                process = psutil.Process(recorded["pid"])
                same = abs(process.create_time() - recorded["started"]) < 0.05
                if same and process.cmdline() == recorded["command"]:
                    process.kill()
                    ours.append(process)
    psutil.wait_procs(ours, timeout=10)
    return len(ours)


@contextlib.contextmanager
def only_one(folder: Path, patience: float = 15.0) -> Iterator[None]:
    """Hold the lock of `folder`; raises BlockingIOError if another run keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield


def run_supervised(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `command` to its end and return its exit code; nothing of it outlives this process."""
    process = children.supervised(command, env=env)
    try:
        return process.wait()
    except BaseException:  # an interrupt: pass it on, wait until all have ended
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def remove_path(where: str) -> None:
    """Remove a file or folder, if it is there."""
    path = Path(where)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Runner:
    """Runs stages; their markers lie in `folder`."""

    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    services: Mapping[str, Service] = field(default_factory=dict)
    remove: Callable[[str], None] = remove_path
    say: Callable[[str], None] = print

    def marker(self, stage: Stage) -> Path:
        """Where the proof lies that `stage` is finished."""
        return self.folder / f"{stage.name}.json"

    def run(self, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
        """Run what is not finished; the markers' content by stage. Raises StageFailed."""
        upstream, done = "", {}
        try:
            for at, stage in enumerate(stages):
                upstream = _fingerprint(stage, upstream)
                marker = read_json(self.marker(stage), _MARKER)
                if marker.get("fingerprint") == upstream:
                    self.say(f"= {stage.title}: done before, {marker['seconds']:.1f} s")
                else:
                    marker = self._run(stage, upstream, marker)
                done[stage.name] = marker
                for name in set(self.services).difference(*(s.needs for s in stages[at + 1 :])):
                    self.services[name].stop()
        finally:
            for service in self.services.values():
                service.stop()
        return done

    def _run(self, stage: Stage, fingerprint: str, former: dict[str, Any]) -> dict[str, Any]:
        marker, attempt = self.marker(stage), self.folder / f"{stage.name}.attempt.json"
        begun = read_json(attempt, _USAGE)
        # What is not known to be another's work is not removed.
        damaged = not begun and not former and (attempt.exists() or marker.exists())
        for name in stage.needs:
            self.services[name].start(self.env)
        if begun.get("fingerprint") == fingerprint:
            usage = Usage(**{key: begun[key] for key in _USAGE})
            self.say(f"> {stage.title}: goes on after {usage.seconds:.1f} s")
        elif damaged:
            usage = Usage(fingerprint)
            self.say(f"> {stage.title}: its record is damaged; goes on with what is there")
        else:
            if begun or marker.exists():
                self.say(f"> {stage.title}: changed, starts anew")
            else:
                self.say(f"> {stage.title}")
            files.set_folder_aside(marker)
            marker.unlink(missing_ok=True)
            for output in stage.outputs:
                self.remove(output)
            usage = Usage(fingerprint)
        usage.attempts += 1
        with metered(usage, attempt):
            code = run_supervised(stage.command, self.env)
        if code != 0:
            raise StageFailed(f"{stage.title} failed: {stage.name} ended with exit code {code}")
        content = {
            "fingerprint": fingerprint,
            "title": stage.title,
            "command": list(stage.command),
            "seconds": usage.seconds,
            "peak_rss_gib": usage.peak_rss_gib,
            "attempts": usage.attempts,
            "report": read_json(stage.report) if stage.report else {},
        }
        write_json(marker, content)
        attempt.unlink()
        self.say(f"+ {stage.title}: {usage.seconds:.1f} s, at most {usage.peak_rss_gib:.2f} GiB")
        return content


def _fingerprint(stage: Stage, upstream: str) -> str:
    parts = [upstream, stage.name, list(stage.command), list(stage.inputs)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
