"""Tracking in MLflow: runs, parameters, metrics keyed by samples seen, artifacts.

Training must never wait for a tracking server, nor end because of one. So everything goes into a
journal on disk, and a thread of its own brings it to the server, trying again for as long as the
run lives. What is left then is brought by the next attempt, or by running a finished job again.

A run carries a key that is on disk before the run is created, so that it is found again whenever a
kill or a full disk keeps its id from being noted. A run that was deleted is restored, or made anew.
Without mlflow nothing is kept: one line says that tracking is off.
"""

import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mdm.utils import files
from mdm.utils.journal import Journal
from mdm.utils.mlflow_run import MlflowRun, RunChanged, first_line, import_mlflow

log = logging.getLogger("mdm")

DEFAULT_STORE = "runs/mlflow.db"
_PARAM_LENGTH = 6000  # MLflow refuses longer values
_METRICS_A_CALL = 1000  # and more than this many a call
_KEY_FILE = "key"
_SHAPES: dict[str, files.Shape] = {
    "params": {"params": dict},
    "metrics": {"metrics": dict, "step": int, "time": int},
    "artifact": {"path": str, "folder": str},
    "text": {"text": str, "path": str},
    "status": {"status": str},
    "former": {"run_id": str, "key": str},
}


class Tracker(Protocol):
    """What a job tells about itself."""

    @property
    def run_id(self) -> str | None:
        """The store's name of the run, once it is known."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the resolved configuration, flat."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record floats at `step` (samples seen); a step that the run already has is skipped."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a file, or a whole folder, under `folder`."""

    def log_text(self, text: str, path: str) -> None:
        """Record `text` as the artifact `path`."""

    def child(self, name: str) -> "Tracker":
        """A run below this one."""

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """Close with FINISHED, FAILED or KILLED; waits at most `timeout` seconds for the queue."""


class NullTracker:
    """Tracks nothing: ranks other than 0, and jobs that ask for no tracking."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Do nothing."""

    def log_text(self, text: str, path: str) -> None:
        """Do nothing."""

    def child(self, name: str) -> Tracker:
        """Another null tracker."""
        return NullTracker()

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """Do nothing."""


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite store under `runs/`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_STORE).absolute()}"


class MlflowTracker:
    """One MLflow run, written by a background thread. See `Tracker` for the methods.

    Entries wait in `journal`, a folder; without one in a temporary folder that ends with the job.
    """

    def __init__(
        self,
        experiment: str,
        name: str,
        run_id: str | None = None,
        uri: str | None = None,
        parent: "MlflowTracker | str | None" = None,
        on_start: Callable[[str], None] | None = None,
        journal: Path | None = None,
    ) -> None:
        self._experiment, self._uri = experiment, uri or default_uri()
        self._wanted_id, self._parent, self._on_start = run_id, parent, on_start
        self._run = MlflowRun(
            *(self._uri, experiment, name, run_id),
            *(self._parent_id, self._key, lambda line: self._warn(line, again=True)),
        )
        self._news, self._ending, self._closing = (threading.Event() for _ in range(3))
        self._dropped = self._warned = self._off = False
        self._failures = 0  # in a row, of what is being brought
        self._announced: str | None = None  # what `on_start` has heard
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._journal, self._folder = self._open_journal(journal)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def _open_journal(self, folder: Path | None) -> tuple[Journal, Path]:
        if folder is not None:
            try:
                return Journal(folder, _misfit), folder
            except OSError as error:
                self._warn(f"{folder} cannot be written ({error}): what is left at the end is lost")
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = Path(self._scratch.name)
        return Journal(folder, _misfit), folder

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None until the store has answered once."""
        return self._run.run_id or self._wanted_id

    @property
    def waiting(self) -> int:
        """Bytes of entries that the store has not taken yet."""
        return len(self._journal)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the resolved configuration, flat."""
        texts = {key: _text(value)[:_PARAM_LENGTH] for key, value in params.items()}
        self._put({"kind": "params", "params": texts})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record floats at `step` in one call to the store."""
        values = {key: float(value) for key, value in metrics.items()}
        now = int(time.time() * 1000)
        self._put({"kind": "metrics", "metrics": values, "step": step, "time": now})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a file, or a whole folder, under `folder`."""
        self._put({"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder})

    def log_text(self, text: str, path: str) -> None:
        """Record `text` as the artifact `path`."""
        self._put({"kind": "text", "text": _text(text), "path": path})

    def child(self, name: str) -> Tracker:
        """A run below this one."""
        return MlflowTracker(self._experiment, name, uri=self._uri, parent=self)

    def end_former(self, run_id: str, key: str) -> None:
        """Close a run that a killed job left RUNNING, by its id or its key, as KILLED."""
        self._put({"kind": "former", "run_id": run_id, "key": key})

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """Close the run; waits at most `timeout` seconds for the store to take what is left."""
        self._put({"kind": "status", "status": status})
        self._ending.set()
        self._news.set()
        self._thread.join(timeout)
        self._closing.set()
        self._news.set()
        if self._thread.is_alive():
            kept = "are lost" if self._scratch else "wait for the next attempt or run of the job"
            self._warn(f"{len(self._journal)} bytes of entries {kept}", again=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    def _put(self, entry: dict[str, Any]) -> None:
        if self._off:
            return
        if self._journal.append(entry):
            self._news.set()
        elif not self._dropped and not self._off:
            self._dropped = True
            log.warning("MLflow's journal takes no more: entries are dropped from now on")

    def _warn(self, message: str, again: bool = False) -> None:
        if not self._warned or again:
            self._warned = True
            # A URI may carry a password, and errors repeat it.
            shown = re.sub(r"//[^/@\s]*@", "//", f"MLflow at {self._uri}: {message}")
            log.warning("%s; training goes on", shown)

    def _work(self) -> None:
        try:
            if self._has_mlflow():
                self._deliver()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._off = True
            self._warn(f"tracking ends: {type(error).__name__}: {first_line(error)}", again=True)
        finally:
            self._journal.close()

    def _has_mlflow(self) -> bool:
        """Import mlflow; where that fails, nothing is to wait for it."""
        try:
            import_mlflow()
        except Exception as error:  # noqa: BLE001 - a broken installation fails in any way
            self._off = True
            self._journal.withdraw()
            log.warning(
                "tracking is off: mlflow cannot be imported (%s: %s); install it, or say "
                "--no_tracking",
                type(error).__name__,
                first_line(error),
            )
            return False
        return True

    def _deliver(self) -> None:
        self._insist(self._run.connect)
        if self._run.is_new:  # a store that has lost its run gets all that there still is
            self._journal.rewind()
        while not self._closing.is_set():
            self._announce()
            self._news.clear()
            waiting = self._journal.waiting()
            if not waiting:
                if self._ending.is_set():
                    return
                self._news.wait()
                continue
            entry, end, backlog = waiting[0]
            lines = [entry]
            if entry["kind"] == "metrics":  # what has piled up goes in few calls
                lines, end = _leading_metrics(waiting)
            stale = entry["kind"] == "status" and backlog  # how a former attempt ended
            if stale or self._insist(lambda lines=lines: self._bring(lines)):  # type: ignore[misc]
                self._journal.take(end)

    def _insist(self, task: Callable[[], None]) -> bool:
        """Run `task` until it succeeds or the job ends; a store's trouble is no reason to stop.

        False if it has not succeeded, or the journal is to be read again.
        """
        pause, self._failures = 1.0, 0
        while not self._closing.is_set():
            try:
                task()
                self._warned = False
                return True
            except RunChanged as change:
                if change.anew:  # it has nothing of what was taken
                    self._journal.rewind()
                return False
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self._failures += 1
                self._warn(f"{type(error).__name__}: {first_line(error)}")
                # One that ends soon asks more often: its server may be back in time.
                self._closing.wait(1.0 if self._ending.is_set() else pause)
                pause = min(2 * pause, 30.0)
        return False

    def _bring(self, entries: list[dict[str, Any]]) -> None:
        self._run.bring(entries, self._failures)

    def _announce(self) -> None:
        """Tell the run's id; that it cannot be noted does not keep entries from the store."""
        if self._on_start is not None and self._run.run_id not in (None, self._announced):
            try:
                self._on_start(str(self._run.run_id))
            except Exception as error:  # noqa: BLE001 - tried again with the next entry
                self._warn(f"the run's id is not noted: {first_line(error)}")
            else:
                self._announced = self._run.run_id

    def _parent_id(self) -> str | None:
        if self._parent is None or isinstance(self._parent, str):
            return self._parent
        found = self._parent._run.run_id
        if found is None:
            raise TimeoutError("the run above this one is not known yet")
        return found

    def _key(self) -> str:
        path = self._folder / _KEY_FILE
        found = read_key(self._folder)
        if not found:
            found = secrets.token_hex(16)
            files.write_bytes(path, found.encode())
        return found


def read_key(journal: Path) -> str:
    """The key of the run whose entries wait in this folder; empty where none is known."""
    path = journal / _KEY_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        files.warn_once(f"{path} cannot be read: {error.strerror or error}; it is ignored")
        return ""
    if re.fullmatch(rb"[0-9a-f]{32}", text):
        return text.decode()
    files.warn_once(f"{path} is damaged: not a key of 32 digits; it is ignored")
    return ""


def _misfit(entry: dict[str, Any]) -> str:
    shape = _SHAPES.get(entry["kind"])
    return f"unknown kind {entry['kind']!r}" if shape is None else files.mismatch(entry, shape)


def _text(value: Any) -> str:
    """What any store can encode."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _leading_metrics(
    waiting: list[tuple[dict[str, Any], int, bool]],
) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics before anything else, as many as one call takes, and where they end."""
    lines: list[dict[str, Any]] = []
    end, values = 0, 0
    for entry, after, _ in waiting:
        if entry["kind"] != "metrics":
            break
        values += len(entry["metrics"])
        if lines and values > _METRICS_A_CALL:
            break
        lines.append(entry)
        end = after
    return lines, end
