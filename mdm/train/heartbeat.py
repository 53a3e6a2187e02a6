"""Heartbeats, hang detection, stop requests, and how an attempt ended.

A supervisor and the ranks of its node share the folder MDM_WATCH:

    rank-00003         heartbeat: step, time, seconds until it counts as hung, part of the step
    rank-00003.json    how the rank ended: code, reason, ranks to blame
    stop               if it exists, all ranks save and end

Without a supervisor, the signals, the stop file of `run_dir` and hang detection work as well.
Nothing here imports torch until a rank hangs, so that a supervisor stays small.
"""

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from mdm.utils import files
from mdm.utils.exit_codes import HALTED, HUNG, INTERRUPTED, ORPHANED, REQUEUE

FOLDER, SUPERVISOR = "MDM_WATCH", "MDM_SUPERVISOR"
JOB = "MDM_JOB"  # the same for all attempts of a supervised job, on every node
STOP_FILE = "STOP"  # in run_dir
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 1800.0  # seconds allowed for start-up, a save or an export
POLL = 0.5
ANSWER_SECONDS = 3.0
ONE_PRESS = 0.5  # seconds within which terminal and launcher both deliver one Ctrl-C

_BEAT = struct.Struct("<qdd16s")
_ENDED: files.Shape = {"rank": int, "code": int, "reason": str, "blamed": list}


@dataclass(frozen=True)
class Beat:
    """A rank's last heartbeat."""

    step: int
    at: float  # seconds, monotonic clock of the machine
    limit: float  # seconds until the next heartbeat is overdue
    part: str

    def overdue(self, now: float) -> float:
        """Seconds beyond the limit; negative within it."""
        return now - self.at - self.limit


@dataclass(frozen=True)
class Ended:
    """How a rank ended, as it reported."""

    rank: int
    code: int
    reason: str = ""
    blamed: tuple[int, ...] = ()


def watch_folder() -> Path | None:
    """The folder shared with a supervisor, if there is one."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder and os.path.isdir(folder) else None


def report_end(code: int, reason: str = "", blamed: Sequence[int] = ()) -> None:
    """Report to the supervisor how this rank ended; only the first report counts."""
    folder = watch_folder()
    if folder is None:
        return
    rank = int(os.environ.get("RANK", "0"))
    path = folder / f"rank-{rank:05d}.json"
    if not path.exists():
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            files.write_json(path, asdict(Ended(rank, code, reason, tuple(blamed))))


def read_beats(folder: Path) -> dict[int, Beat]:
    """The last heartbeat of every rank that has started."""
    beats = {}
    for path in folder.glob("rank-" + "[0-9]" * 5):
        data = path.read_bytes()[: _BEAT.size]
        if len(data) == _BEAT.size:  # otherwise it is being created
            step, at, limit, part = _BEAT.unpack(data)
            name = part.rstrip(b"\0").decode(errors="replace")
            beats[int(path.name[5:])] = Beat(step, at, limit, name)
    return beats


def read_ends(folder: Path) -> list[Ended]:
    """How ranks ended, of those that have reported."""
    return [
        Ended(v["rank"], v["code"], v["reason"], tuple(b for b in v["blamed"] if type(b) is int))
        for path in sorted(folder.glob("rank-*.json"))
        if (v := files.read_json(path, _ENDED))
    ]


class Heartbeat:
    """Writes a rank's heartbeats, and watches for stop requests and hangs in a thread.

    A step that takes longer than `hang_seconds` and ten mean steps is a hang. It ends the process
    with HUNG, after the stacks of its threads and the last collectives went to `run_dir/hangs`.
    """

    def __init__(self, run_dir: Path, rank: int, size: int, hang_seconds: float) -> None:
        self.run_dir, self.rank, self.size, self.hang_seconds = run_dir, rank, size, hang_seconds
        self.log: Path | None = None  # its modification time tells when the run was last alive
        self.requested = 0  # REQUEUE or HALTED once a stop is requested
        self._interrupted = 0.0  # when the first Ctrl-C arrived
        self._step, self._steps_taken, self._step_began, self._mean = 0, 0, 0.0, 0.0
        self._beat = Beat(0, time.monotonic(), PATIENCE, "start")
        self._shared: mmap.mmap | None = None
        if folder := watch_folder():
            path = folder / f"rank-{rank:05d}"
            path.write_bytes(bytes(_BEAT.size))
            with path.open("r+b") as file:
                self._shared = mmap.mmap(file.fileno(), _BEAT.size)
        self._closed = threading.Event()
        self._former = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._former[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        self._supervisor = _supervisor()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="mdm-watch", daemon=True)
        self._thread.start()

    def begin_step(self, step: int) -> None:
        """Record that step `step` begins."""
        now = time.monotonic()
        if self._steps_taken:
            took = now - self._step_began
            self._mean += (took - self._mean) / min(self._steps_taken, 100)
        self._step, self._step_began = step, now
        self._steps_taken += 1
        self.enter("step")

    def enter(self, part: str) -> None:
        """Record that this rank begins `part` of its step."""
        limit = max(self.hang_seconds, 10 * self._mean)
        if self._steps_taken < 2 or part in ("save", "export", "load", "end"):
            limit = max(PATIENCE, limit)
        self._beat = Beat(self._step, time.monotonic(), limit, part)
        self._write()

    def _write(self) -> None:
        if self._shared is not None:
            beat = self._beat
            self._shared[:] = _BEAT.pack(beat.step, beat.at, beat.limit, beat.part.encode()[:16])

    def close(self) -> None:
        """Stop watching, and restore the former signal handlers."""
        self._closed.set()
        self._thread.join()
        for number, former in self._former.items():
            signal.signal(number, former)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or REQUEUE

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Request a stop at the first Ctrl-C; end at once at a second, or before the first step."""
        if not self._steps_taken:
            raise KeyboardInterrupt
        now, first = time.monotonic(), self._interrupted
        self._interrupted = first or now
        self.requested = self.requested or REQUEUE
        if not first and self.rank == 0:
            os.write(2, b"\nCtrl-C: saving, then ending; press again to end at once\n")
        elif first and now - first > ONE_PRESS:
            if self.rank == 0:
                os.write(2, b"\nCtrl-C again: ended at once; the last checkpoint counts\n")
            os._exit(INTERRUPTED)

    def _watch(self) -> None:
        folder = watch_folder()
        while not self._closed.wait(POLL):
            if self._supervisor is not None and not _is_alive(self._supervisor):
                self._end(ORPHANED, "its supervisor is gone")
            if folder is not None and (folder / "stop").exists():
                self.requested = self.requested or REQUEUE
            if (self.run_dir / STOP_FILE).exists():
                self.requested = HALTED
            if self.log is not None:
                with contextlib.suppress(OSError):
                    os.utime(self.log)
            if self._beat.overdue(time.monotonic()) > 0:
                self._hang()

    def _hang(self) -> None:
        beat = self._beat
        where = f"{beat.part} of step {beat.step}"
        blamed, others = self._who_is_missing(where)
        names = ", ".join(map(str, blamed))
        reason = f"hangs in {where} for {time.monotonic() - beat.at:.0f} s"
        if blamed:
            reason += f"; no sign of life from rank {names}"
        elif others:
            reason += f"; the ranks are in: {others}"
        folder = self.run_dir / "hangs"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-rank-{self.rank:05d}"
            with (folder / f"{name}.stacks").open("w", encoding="utf-8") as file:
                file.write(f"rank {self.rank} {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            (folder / f"{name}.collectives.json").write_bytes(_last_collectives())
            reason += f"; stacks are in {folder}"
        self._end(HUNG, reason, blamed)

    def _end(self, code: int, reason: str, blamed: Sequence[int] = ()) -> None:
        report_end(code, reason, blamed)
        print(f"rank {self.rank} {reason}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(code)

    def _who_is_missing(self, where: str) -> tuple[list[int], str]:
        """The ranks whose watch threads do not answer, and where the others are.

        A stopped process cannot answer. The store is queried in a thread of its own, because the
        stopped process may be its host, rank 0, which is then to blame.
        """
        if self.size == 1:
            return [], where
        answers: dict[int, str] = {}
        query = threading.Thread(target=self._query_store, args=(where, answers), daemon=True)
        query.start()
        query.join(2 * ANSWER_SECONDS + 0.1 * self._beat.limit)
        if not answers:
            return [0], ""
        missing = [rank for rank in range(self.size) if rank not in answers]
        return missing, ", ".join(f"{rank}: {answers[rank]}" for rank in sorted(answers))

    def _query_store(self, where: str, answers: dict[int, str]) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        store.set(f"mdm/hang/{self.rank}", where)
        end = time.monotonic() + ANSWER_SECONDS + 0.1 * self._beat.limit
        while len(answers) < self.size and time.monotonic() < end:
            for rank in range(self.size):
                if rank not in answers and store.check([f"mdm/hang/{rank}"]):
                    answers[rank] = store.get(f"mdm/hang/{rank}").decode()
            time.sleep(0.2)


def _last_collectives() -> bytes:
    """The flight recorder's record of this rank's last collectives, as JSON."""
    from torch._C import _distributed_c10d

    try:
        return bytes(getattr(_distributed_c10d, "_dump_fr_trace_json")())  # noqa: B009 - untyped
    except (RuntimeError, AttributeError) as error:
        return json.dumps({"error": str(error)}).encode()


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _supervisor() -> psutil.Process | None:
    """The process that restarts this one, if there is one: its id is in MDM_SUPERVISOR."""
    try:
        return psutil.Process(int(pid)) if (pid := os.environ.get(SUPERVISOR)) else None
    except psutil.NoSuchProcess:
        report_end(ORPHANED, "its supervisor is gone")
        os._exit(ORPHANED)
