"""Supervises attempts at a job on this node: starts ranks, checks heartbeats, ends, restarts."""

from mdm.launch.job import one_line

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mdm.config import doc
from mdm.launch.processes import adopt_orphans, end_descendants
from mdm.launch.rendezvous import Attempt, Rendezvous, read_hostfile
from mdm.train import heartbeat
from mdm.utils import exit_codes as codes
from mdm.utils.command_line import fail

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SETTLE = 5.0  # seconds that ranks have to report their end after its first sign
SILENCE = 10.0  # a hanging rank has so many seconds, and a fifth of its limit, to report it itself
HEARTBEATS = "mdm-heartbeats-"  # how the names of heartbeat folders begin


@dataclass(frozen=True)
class Flags:
    """How to restart a job."""

    restarts: int = doc(10, "failures in a row without a step forward, before giving up")
    backoff: float = doc(2.0, "seconds before a restart; doubled for each failure in a row")
    longest_backoff: float = doc(300.0, "seconds before a restart at most")
    grace: float = doc(600.0, "seconds that ranks have to save when asked to stop")
    hostfile: str = doc("", "DeepSpeed's hostfile (`name slots=N` a line), the same on every node")
    rendezvous: str = doc("", "shared folder in which the supervisors of all nodes meet")
    min_nodes: int = doc(0, "nodes that an attempt needs; 0: all of the hostfile")
    join: float = doc(120.0, "seconds to wait for nodes beyond min_nodes")
    node: str = doc("", "this node's name in the hostfile; empty: found by the host's name")
    strikes: int = doc(3, "failures that began on a node before it is left out")

    def __post_init__(self) -> None:
        if bool(self.hostfile) != bool(self.rendezvous):
            raise ValueError(
                "--hostfile and --rendezvous belong together: both are for several nodes"
            )
        for name in ("restarts", "backoff", "grace", "min_nodes", "join"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must not be negative")


@dataclass
class Outcome:
    """How an attempt ended."""

    code: int  # an exit code; GAVE_UP for any failure
    reason: str
    step: int = -1  # the last one that a rank of this node began
    began_here: bool = False  # whether a process of this node failed first


def say(text: str) -> None:
    """Print a line of the supervisor itself."""
    sys.stderr.write(f"supervise: {text}\n")


def command_of(command: Sequence[str], attempt: Attempt, folder: Path) -> list[str]:
    """The launcher's command line for one attempt; other programs find the port in MASTER_PORT."""
    program, rest = Path(command[0]).name, list(command[1:])
    if program == "deepspeed":
        flags = ["--master_port", str(attempt.port)]
        if attempt.hosts:
            hosts = folder / "hostfile"
            lines = [f"{name} slots={attempt.hosts[name]}" for name in attempt.nodes]
            hosts.write_text("\n".join(lines) + "\n", encoding="utf-8")
            flags += ["--hostfile", str(hosts), "--no_ssh", "--master_addr", attempt.address]
            flags += ["--node_rank", str(attempt.rank)]
        return [command[0], *flags, *rest]
    if program == "torchrun":
        flags = ["--master-port", str(attempt.port), "--max-restarts", "0"]
        if len(attempt.nodes) > 1:
            flags += ["--nnodes", str(len(attempt.nodes)), "--node-rank", str(attempt.rank)]
            flags += ["--master-addr", attempt.address]
        if attempt.hosts and "--nproc-per-node" not in rest:
            flags += ["--nproc-per-node", str(attempt.hosts[attempt.nodes[attempt.rank]])]
        return [command[0], *flags, *rest]
    return list(command)


def shared_memory() -> set[Path]:
    """The files of this user's training processes in /dev/shm."""
    paths = set()
    for pattern in ("deepspeed_*", "nccl-*", "torch_*", "__KMP*"):
        for path in Path("/dev/shm").glob(pattern):
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.getuid():
                    paths.add(path)
    return paths


def clear_shared_memory(before: set[Path]) -> None:
    """Remove files newer than `before` that no process has mapped or open, and name them."""
    new = shared_memory() - before
    used: set[str] = set()
    for process in psutil.process_iter() if new else ():
        with contextlib.suppress(psutil.Error, OSError):
            used |= {m.path for m in process.memory_maps()}
            used |= {f.path for f in process.open_files()}
    for path in sorted(new - {Path(name) for name in used}):
        path.unlink(missing_ok=True)
        say(f"removed {path}")


def clear_heartbeat_folders() -> None:
    """Remove the heartbeat folders of supervisors that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{HEARTBEATS}*-*"):
        pid = folder.name.removeprefix(HEARTBEATS).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Supervisor:
    """Runs attempts on this node until the job is done, is asked to stop, or fails too often."""

    flags: Flags
    command: Sequence[str]
    stop_signal: str = ""  # the one that asked this process to stop
    best: int = -1  # the furthest step that any attempt began
    failures: int = 0  # in a row, without a step forward
    shared: set[Path] = field(default_factory=shared_memory)

    def __post_init__(self) -> None:
        folder = self.flags.rendezvous
        # The same for all attempts and on all nodes.
        self.job = str(Path(folder).resolve()) if folder else secrets.token_hex(8)

    def run(self) -> int:
        """The job's exit code."""
        adopt_orphans()
        for number in STOPPING:
            signal.signal(number, self._on_signal)
        clear_heartbeat_folders()
        with self._rendezvous() as rendezvous:
            while True:
                attempt = rendezvous.next_attempt(lambda: bool(self.stop_signal))
                if attempt is None:
                    say(f"{self.stop_signal}: nothing was running")
                    return codes.REQUEUE
                outcome = self.attempt(attempt, rendezvous)
                if outcome.code == codes.GAVE_UP and outcome.began_here:
                    rendezvous.strike()
                code = self._judge(outcome)
                if code is not None:
                    return code

    def _rendezvous(self) -> Rendezvous:
        if not self.flags.hostfile:
            return Rendezvous()
        flags, node = self.flags, self.flags.node or socket.gethostname()
        try:
            hosts = read_hostfile(Path(flags.hostfile))
        except (OSError, ValueError) as error:
            fail(f"supervise: --hostfile: {one_line(error)}")
        if node not in hosts:
            fail(f"supervise: this node is {node}, the hostfile has {', '.join(hosts)}; see --node")
        folder, least = Path(flags.rendezvous), flags.min_nodes or len(hosts)
        return Rendezvous(folder, hosts, node, least, flags.join, flags.strikes)

    def _judge(self, outcome: Outcome) -> int | None:
        """The job's exit code, or None for another attempt."""
        if outcome.code in (codes.DONE, codes.MISTAKE, codes.HALTED):
            say(outcome.reason)
            return outcome.code
        if self.stop_signal:
            say(f"{self.stop_signal}: {outcome.reason}")
            return codes.REQUEUE
        if outcome.step > self.best:
            self.best, self.failures = outcome.step, 0
        if outcome.code != codes.REQUEUE:  # REQUEUE: a rank was asked to stop, and saved
            self.failures += 1
        if self.failures > self.flags.restarts:
            say(f"{outcome.reason}; {self.failures} failures in a row without a step forward")
            return codes.GAVE_UP
        flags, n = self.flags, self.failures
        pause = min(flags.backoff * 2 ** (n - 1), flags.longest_backoff) if n else 0.0
        say(f"{outcome.reason}; restart in {pause:.0f} s ({n} of {flags.restarts})")
        end = time.monotonic() + pause
        while time.monotonic() < end and not self.stop_signal:
            time.sleep(0.1)
        return None

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop_signal = signal.Signals(number).name

    def attempt(self, attempt: Attempt, rendezvous: Rendezvous) -> Outcome:
        """Run the command once; none of its processes and files is left afterwards."""
        with tempfile.TemporaryDirectory(
            prefix=f"{HEARTBEATS}{os.getpid()}-", ignore_cleanup_errors=True
        ) as name:
            folder = Path(name)
            env = os.environ | {
                heartbeat.FOLDER: str(folder),
                heartbeat.SUPERVISOR: str(os.getpid()),
                heartbeat.JOB: self.job,
                "MASTER_PORT": str(attempt.port),
            }
            try:
                launcher = subprocess.Popen(
                    command_of(self.command, attempt, folder), env=env, start_new_session=True
                )
            except FileNotFoundError as error:
                return Outcome(codes.MISTAKE, f"cannot run {self.command[0]}: {error.strerror}")
            outcome = self._watch(launcher, folder, attempt, rendezvous)
            end_descendants()
            launcher.wait()
            with contextlib.suppress(ChildProcessError):  # no adopted process is left to reap
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            clear_shared_memory(self.shared)
            return outcome

    def _watch(
        self,
        launcher: "subprocess.Popen[bytes]",
        folder: Path,
        attempt: Attempt,
        rendezvous: Rendezvous,
    ) -> Outcome:
        """Wait until the attempt has ended, in whatever way."""
        stopping = ending = float("inf")  # when the ranks were asked to stop; first sign of an end
        while True:
            now = time.monotonic()
            beats, ends = heartbeat.read_beats(folder), heartbeat.read_ends(folder)
            if self.stop_signal and stopping > now:
                stopping = now
                (folder / "stop").touch()
            exited = launcher.poll() is not None
            silent = [r for r, b in beats.items() if b.overdue(now) > SILENCE + 0.2 * b.limit]
            hung = [] if ends else silent
            lost = rendezvous.broken(attempt)
            finished = bool(beats) and len(ends) == len(beats)
            failed = any(e.code not in (codes.DONE, codes.REQUEUE, codes.HALTED) for e in ends)
            if exited or failed or hung or finished or lost:
                ending = min(ending, now)
            step = max((beat.step for beat in beats.values()), default=-1)
            if now - stopping > self.flags.grace:
                reason = f"the ranks did not save in {self.flags.grace:.0f} s"
                return Outcome(codes.GAVE_UP, lost or reason, step)
            # Without a heartbeat, training never began.
            if now - ending > SETTLE or (exited and (finished or not beats)):
                outcome = self._conclude(beats, ends, hung, launcher.poll(), step)
                if lost and outcome.code == codes.GAVE_UP:
                    return Outcome(codes.GAVE_UP, lost, step)
                return outcome
            time.sleep(0.2)

    def _conclude(
        self,
        beats: dict[int, heartbeat.Beat],
        ends: list[heartbeat.Ended],
        hung: list[int],
        launcher_code: int | None,
        step: int,
    ) -> Outcome:
        """The outcome on this node, from the ranks' heartbeats and reports."""
        if hung:
            ranks = ", ".join(f"{r} (in {beats[r].part} of step {beats[r].step})" for r in hung)
            return Outcome(codes.GAVE_UP, f"no heartbeat of rank {ranks}", step, began_here=True)
        reported = {e.code for e in ends}
        for code, reason in (
            (codes.MISTAKE, "a mistake that the user has to fix"),
            (codes.HALTED, "ended by the file STOP: not done, not to be requeued"),
            (codes.REQUEUE, "asked to stop, and saved"),
        ):
            if code in reported:
                own_words = (e.reason for e in ends if e.code == code and e.reason)
                return Outcome(code, next(own_words, reason), step)
        killed = sorted(set(beats) - {e.rank for e in ends})
        if reported == {codes.DONE} and not killed:
            return Outcome(codes.DONE, f"done after step {step}", step)
        reasons = [f"rank {e.rank}: {e.reason}" for e in ends if e.reason]
        if killed:
            reasons.insert(0, f"rank {', '.join(map(str, killed))} ended without a report")
        if not beats and not ends:
            reasons = [f"{self.command[0]} ended with {launcher_code} before training began"]
        began_here = bool(killed) or not beats or any(set(e.blamed) & set(beats) for e in ends)
        return Outcome(codes.GAVE_UP, "; ".join(reasons) or "it failed", step, began_here)
