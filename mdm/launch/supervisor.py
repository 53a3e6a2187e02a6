"""Attempts at a job on this node: start, heartbeat, end, start again."""

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
from mdm.launch.processes import end_descendants, prctl
from mdm.launch.rendezvous import Attempt, Rendezvous, read_hostfile
from mdm.train import heartbeat
from mdm.utils import exit_codes as codes
from mdm.utils.command_line import fail

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


SETTLE = 5.0  # seconds between the first sign of an end and the last process that may report one


SILENCE = 10.0  # a rank that hangs is given so long, and a fifth of its limit, to say so itself


SHARED = Path("/dev/shm")


_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Flags:
    """How to keep a job going."""

    restarts: int = doc(10, "failures in a row without a step forward, before giving up")
    backoff: float = doc(2.0, "seconds before a restart; doubled for each failure in a row")
    longest_backoff: float = doc(300.0, "seconds before a restart at most")
    grace: float = doc(600.0, "seconds that ranks get to save when told to stop")
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

    code: int  # one of mdm.train.heartbeat's, GAVE_UP for any failure
    reason: str
    step: int = -1  # the last one that a rank of this node began
    blamed: tuple[int, ...] = ()
    hurt: bool = False  # whether it was a process of this node that failed first


def say(text: str) -> None:
    """A line of the supervisor's own."""
    sys.stderr.write(f"supervise: {text}\n")
    sys.stderr.flush()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def command_of(command: Sequence[str], attempt: Attempt, folder: Path) -> list[str]:
    """The launcher's command line for one attempt; other programs get the port by environment."""
    program, rest = Path(command[0]).name, list(command[1:])
    several = len(attempt.nodes) > 1
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
        if several:
            flags += ["--nnodes", str(len(attempt.nodes)), "--node-rank", str(attempt.rank)]
            flags += ["--master-addr", attempt.address]
        if attempt.hosts and "--nproc-per-node" not in rest:
            flags += ["--nproc-per-node", str(attempt.hosts[attempt.nodes[attempt.rank]])]
        return [command[0], *flags, *rest]
    return list(command)


def shared_memory() -> set[Path]:
    """What this user's training processes have in /dev/shm."""
    found = set()
    for pattern in ("deepspeed_*", "nccl-*", "torch_*", "__KMP*"):
        for path in SHARED.glob(pattern):
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.getuid():
                    found.add(path)
    return found


def clear_shared_memory(before: set[Path]) -> list[Path]:
    """Remove what appeared since `before` and that no living process has mapped or open."""
    new = shared_memory() - before
    if not new:
        return []
    used: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            used |= {m.path for m in process.memory_maps()}
            used |= {f.path for f in process.open_files()}
    gone = [path for path in sorted(new) if str(path) not in used]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def clear_watch_folders() -> None:
    """Remove the folders of supervisors that were killed."""
    for folder in Path(tempfile.gettempdir()).glob("mdm-watch-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Supervisor:
    """Runs attempts on this node until the job is done, told to stop, or past help."""

    flags: Flags
    command: Sequence[str]
    asked: str = ""  # the signal that asked this process to stop
    best: int = -1  # the furthest step that any attempt began
    failures: int = 0  # in a row, without a step forward
    shared: set[Path] = field(default_factory=shared_memory)
    job: str = field(default_factory=lambda: secrets.token_hex(8))  # of all attempts

    def __post_init__(self) -> None:
        if self.flags.rendezvous:  # the supervisors of all nodes
            self.job = str(Path(self.flags.rendezvous).resolve())

    def run(self) -> int:
        """The job's exit code."""
        if sys.platform == "linux":
            prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in STOPPING:
            signal.signal(number, self._on_signal)
        clear_watch_folders()
        rendezvous = self._rendezvous()
        with rendezvous:
            while True:
                attempt = rendezvous.next_attempt(lambda: bool(self.asked))
                if attempt is None:
                    say(f"{self.asked}: nothing was running")
                    return codes.REQUEUE
                outcome = self.attempt(attempt, rendezvous)
                rendezvous.ended(attempt, outcome.code == codes.GAVE_UP and outcome.hurt)
                code = self._judge(outcome)
                if code is not None:
                    return code

    def _rendezvous(self) -> Rendezvous:
        if not self.flags.hostfile:
            return Rendezvous.alone(free_port)
        try:
            hosts = read_hostfile(Path(self.flags.hostfile))
        except OSError as error:
            fail(f"supervise: --hostfile {self.flags.hostfile}: {error.strerror}")
        except ValueError as error:
            fail(f"supervise: {error}")
        own = self.flags.node or socket.gethostname()
        if own not in hosts:
            fail(f"supervise: this node is {own}, the hostfile has {', '.join(hosts)}; see --node")
        least = self.flags.min_nodes or len(hosts)
        return Rendezvous(
            Path(self.flags.rendezvous),
            hosts,
            own,
            least,
            self.flags.join,
            self.flags.strikes,
            free_port,
        )

    def _judge(self, outcome: Outcome) -> int | None:
        """The job's exit code, or None for one more attempt."""
        if outcome.code in (codes.DONE, codes.MISTAKE, codes.HALTED):
            say(outcome.reason)
            return outcome.code
        if self.asked:
            say(f"{self.asked}: {outcome.reason}")
            return codes.REQUEUE
        if outcome.step > self.best:
            self.best, self.failures = outcome.step, 0
        self.failures += outcome.code != codes.REQUEUE  # a rank was told to stop: it has saved
        if self.failures > self.flags.restarts:
            say(f"{outcome.reason}; {self.failures} failures in a row without a step forward")
            return codes.GAVE_UP
        pause = 0.0
        if self.failures:
            pause = min(self.flags.backoff * 2 ** (self.failures - 1), self.flags.longest_backoff)
        say(
            f"{outcome.reason}; restart in {pause:.0f} s ({self.failures} of {self.flags.restarts})"
        )
        end = time.monotonic() + pause
        while time.monotonic() < end and not self.asked:
            time.sleep(0.1)
        return None

    def _on_signal(self, number: int, frame: object) -> None:
        self.asked = signal.Signals(number).name

    def attempt(self, attempt: Attempt, rendezvous: Rendezvous) -> Outcome:
        """Run the command once; nothing of it is left afterwards."""
        folder = Path(tempfile.mkdtemp(prefix=f"mdm-watch-{os.getpid()}-"))
        try:
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
            outcome = self._mind(launcher, folder, attempt, rendezvous)
            end_descendants()
            launcher.wait()
            self._bury()
            for path in clear_shared_memory(self.shared):
                say(f"removed {path}")
            return outcome
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _bury(self) -> None:
        """Reap the adopted processes."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _mind(
        self,
        launcher: "subprocess.Popen[bytes]",
        folder: Path,
        attempt: Attempt,
        rendezvous: Rendezvous,
    ) -> Outcome:
        """Wait until the attempt is over, one way or another."""
        told: float | None = None
        over: float | None = None  # when the first sign of an end was seen
        while True:
            now = time.monotonic()
            beats, ends = heartbeat.read_beats(folder), heartbeat.read_ends(folder)
            if self.asked and told is None:
                told = now
                (folder / "stop").touch()
            exited = launcher.poll() is not None
            hung = [] if ends else [r for r, b in beats.items() if _silent(b, now)]
            lost = rendezvous.broken(attempt)
            finished = bool(beats) and len(ends) == len(beats)
            failed = any(e.code not in (codes.DONE, codes.REQUEUE, codes.HALTED) for e in ends)
            if over is None and (exited or failed or hung or finished or lost):
                over = now
            late = told is not None and now - told > self.flags.grace
            settled = over is not None and (now - over > SETTLE or (exited and finished))
            if exited and not beats:
                settled = True  # it never came to training
            if settled or late:
                outcome = self._conclude(launcher, beats, ends, hung, late)
                if lost and outcome.code == codes.GAVE_UP:
                    outcome.reason, outcome.hurt = lost, False
                return outcome
            time.sleep(0.2)

    def _conclude(
        self,
        launcher: "subprocess.Popen[bytes]",
        beats: dict[int, heartbeat.Beat],
        ends: list[heartbeat.Ended],
        hung: list[int],
        late: bool,
    ) -> Outcome:
        step = max((b.step for b in beats.values()), default=-1)
        if late:
            return Outcome(
                codes.GAVE_UP, f"the ranks did not save in {self.flags.grace:.0f} s", step
            )
        if hung:
            names = ", ".join(f"{r} (in {beats[r].part} of step {beats[r].step})" for r in hung)
            return Outcome(codes.GAVE_UP, f"no heartbeat of rank {names}", step, tuple(hung), True)
        ended_with = {e.code for e in ends}
        missing = sorted(set(beats) - {e.rank for e in ends})
        for code, reason in (
            (codes.MISTAKE, "a mistake that a person has to mend"),
            (
                codes.HALTED,
                f"ended by the file {heartbeat.STOP_FILE}: not done, not to be requeued",
            ),
            (codes.REQUEUE, "told to stop, and saved"),
        ):
            if code in ended_with:
                detail = next((e.reason for e in ends if e.code == code and e.reason), reason)
                return Outcome(code, detail, step)
        if ended_with == {codes.DONE} and not missing:
            return Outcome(codes.DONE, f"done after step {step}", step)
        reasons = [f"rank {e.rank}: {e.reason}" for e in ends if e.reason]
        killed = [r for r in missing if r in beats]
        blamed = tuple(sorted({b for e in ends for b in e.blamed} | set(killed)))
        if killed:
            reasons.insert(0, f"rank {', '.join(map(str, killed))} ended without a word")
        if not beats and not ends:
            reasons = [f"{self.command[0]} ended with {launcher.poll()} before training began"]
        hurt = bool(killed) or not beats or any(set(e.blamed) & set(beats) for e in ends)
        return Outcome(codes.GAVE_UP, "; ".join(reasons) or "it failed", step, blamed, hurt)


def _silent(beat: heartbeat.Beat, now: float) -> bool:
    return beat.overdue(now) > SILENCE + 0.2 * beat.limit
