"""Delivers a run's `metrics.jsonl` and `events.jsonl` to MLflow.

A run never waits for an MLflow server. A background thread sends the lines after the positions in
`tracking.json`, and retries for as long as the job runs. The next attempt sends the rest, and so
does the command of a finished run if it is started again.

A line of metrics is recorded at its `samples_seen`. Steps that MLflow already has are skipped, so a
file that was rewritten is read again from its first line. An event's `artifacts` map an artifact's
name to a file (a path below the run's folder) or to a JSON object.

`tracking.json` also has the id of the MLflow run, and a key that is written before the run is
created, by which it is found again if its id was not written. Without mlflow one warning says that
tracking is off.
"""

import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mdm.utils import files
from mdm.utils.mlflow_run import MlflowRun, RunChanged, first_line, import_mlflow
from mdm.utils.progress import (
    EVENTS,
    METRICS,
    START,
    TRACKING,
    Progress,
    unsent_bytes,
    unsent_lines,
)

log = logging.getLogger("mdm")

_PARAM_LENGTH = 6000  # MLflow's limit
_METRICS_A_CALL = 1000  # MLflow's limit
_POLL_SECONDS = 1.0
_LATER = "wait for the next attempt, or for this command to be run again"
_KEYS = ("step", "samples_seen", "time")  # of a line of metrics; all other numbers are metrics
_METRICS_LINE: files.Shape = {"samples_seen": int, "time": float}
_EVENT_LINE: files.Shape = {"event": str}


class NullTracker:
    """Stands for a tracker on ranks other than 0, and in jobs that are not tracked."""

    run_id = identity = ""

    def finish(self, status: str = "FINISHED") -> None:
        """Do nothing."""


class MlflowTracker:
    """Sends the metrics and events in `folder` to one MLflow run, from a background thread.

    Args:
        folder: holds `metrics.jsonl`, `events.jsonl` and `tracking.json`.
        experiment: its name, restored if it was deleted.
        name: name of a new run.
        params: the resolved configuration, flat. A run keeps the first values that it gets.
        uri: the store; by default MLFLOW_TRACKING_URI, or the SQLite store under `runs/`.
        identity: `identity` of the tracker of a former attempt, if `tracking.json` is lost.
        parent: id of the run above this one, or empty.
        config: fingerprint of the configuration, for `tracking.json`.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        name: str,
        *,
        params: Mapping[str, Any],
        uri: str = "",
        identity: str = "",
        parent: str = "",
        config: str = "",
    ) -> None:
        default = f"sqlite:///{Path('runs/mlflow.db').absolute()}"
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or default
        self._folder = folder
        self._params = {k: _encodable(v)[:_PARAM_LENGTH] for k, v in params.items()}
        self._progress = Progress.read(folder)
        self._progress.config = config
        self._progress.key = self._progress.key or identity or secrets.token_hex(16)
        self._run = MlflowRun(
            self._uri,
            experiment,
            name,
            run_id=self._progress.run_id or identity,
            parent=parent,
            key=self._progress.key,
            warn=lambda line: self._warn(line, repeat=True),
        )
        self._first_entries = self._entries_outside_files()  # sent before any line of the files
        self._written: dict[str, Any] = {}  # what `tracking.json` holds
        self._written_at = 0.0
        self._status = "FINISHED"
        self._ending, self._closing = threading.Event(), threading.Event()
        self._warned = False
        self._failures = 0  # in a row, of the entries that are being sent
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The MLflow run's id; empty until the store has answered once."""
        return self._run.run_id or self._progress.run_id

    @property
    def identity(self) -> str:
        """The run's id, or its key while the id is unknown: both find the run again."""
        return self.run_id or self._progress.key

    @property
    def waiting(self) -> int:
        """Bytes of lines that the store has not received yet."""
        return unsent_bytes(self._folder, self._progress)

    def finish(self, status: str = "FINISHED", timeout: float = 30.0, unsent: str = _LATER) -> None:
        """Close the run with FINISHED, FAILED or KILLED once everything is sent.

        After `timeout` seconds a warning says how much is left, and that it is `unsent`.
        """
        self._status = status
        self._ending.set()
        self._thread.join(timeout)
        self._closing.set()
        if self._thread.is_alive():
            self._warn(f"{self.waiting} bytes of metrics and events {unsent}", repeat=True)

    def _warn(self, message: str, repeat: bool = False) -> None:
        if not self._warned or repeat:
            self._warned = True
            # A URI may contain a password, and errors repeat it.
            line = re.sub(r"//[^/@\s]*@", "//", f"MLflow at {self._uri}: {message}")
            log.warning("%s; the job continues", line)

    def _work(self) -> None:
        try:
            import_mlflow()
        except Exception as error:  # noqa: BLE001 - a broken installation may raise anything
            advice = "install it, or give --no_tracking"
            problem = f"mlflow cannot be imported ({first_line(error)})"
            log.warning("tracking is off: %s; %s", problem, advice)
            return
        try:
            self._deliver()
        except Exception as error:  # noqa: BLE001 - no error may end the job
            self._warn(f"tracking ends: {first_line(error)}", repeat=True)

    def _deliver(self) -> None:
        self._retry(self._connect)
        while not self._closing.is_set():
            is_ending = self._ending.is_set()  # before the files are read: no line comes after
            has_sent = self._send_first() or self._send_metrics() or self._send_event()
            if not has_sent or time.monotonic() > self._written_at + _POLL_SECONDS:
                self._write_progress()
            if has_sent:
                continue
            if not is_ending:
                self._ending.wait(_POLL_SECONDS)
            elif self._send(self._run.end, self._status):
                self._progress.status = self._status
                break
        self._write_progress()

    def _connect(self) -> None:
        self._progress.status = ""
        self._progress.write(self._folder)  # a run is created only once its key is on disk
        self._run.connect()
        self._begin_run()

    def _begin_run(self) -> None:
        """Send everything there is if the run was created."""
        if self._run.is_new:
            self._run.is_new = False
            self._first_entries = self._entries_outside_files()
            self._progress.metrics = self._progress.events = START
        self._progress.run_id = self._run.run_id or self._progress.run_id

    def _entries_outside_files(self) -> list[tuple[Any, ...]]:
        former = [(self._run.end_former, *run) for run in self._progress.former]
        return [(self._run.log_params, self._params), *former]

    def _send_first(self) -> bool:
        """Send what does not stand in the files; whether there was anything."""
        if not self._first_entries:
            return False
        if self._send(*self._first_entries[0]):
            del self._first_entries[0]
            if not self._first_entries:
                self._progress.former = []
        return True

    def _send_metrics(self) -> bool:
        """Send the next lines of metrics, as many as fit into a call; whether there was any."""
        entries: list[tuple[dict[str, float], int, int]] = []
        values, position = 0, None
        for row, end in unsent_lines(self._folder / METRICS, self._progress.metrics, _METRICS_LINE):
            if row is not None:
                metrics = {k: float(v) for k, v in row.items() if k not in _KEYS and _is_number(v)}
                values += len(metrics)
                if entries and values > _METRICS_A_CALL:
                    break
                entries.append((metrics, row["samples_seen"], int(1000 * row["time"])))
            position = end
        if position is not None and (not entries or self._send(self._run.log_metrics, entries)):
            self._progress.metrics = position
        return position is not None

    def _send_event(self) -> bool:
        """Send the artifacts of the next event; whether there was one."""
        for event, end in unsent_lines(self._folder / EVENTS, self._progress.events, _EVENT_LINE):
            artifacts = (event or {}).get("artifacts")
            entries = [
                (name, self._folder / content if isinstance(content, str) else content)
                for name, content in (artifacts if isinstance(artifacts, dict) else {}).items()
            ]
            if all(self._send(self._run.log_artifact, *entry) for entry in entries):
                self._progress.events = end
            return True
        return False

    def _send(self, write: Callable[..., None], *content: Any) -> bool:
        return self._retry(lambda: self._run.send(write, *content, failures=self._failures))

    def _retry(self, task: Callable[[], None]) -> bool:
        """Run `task` until it succeeds or the job ends.

        Returns False if it has not succeeded, or the files must be read again.
        """
        pause, self._failures = 1.0, 0
        while not self._closing.is_set():
            try:
                task()
                self._warned = False
                return True
            except RunChanged:
                self._begin_run()
                return False
            except Exception as error:  # noqa: BLE001 - no error may end the job
                self._failures += 1
                self._warn(first_line(error))
                # A job that is ending retries every second: its server may be back in time.
                self._closing.wait(1.0 if self._ending.is_set() else pause)
                pause = min(2 * pause, 30.0)
        return False

    def _write_progress(self) -> None:
        """Write `tracking.json` if it has changed; a failure is retried with the next line."""
        self._written_at = time.monotonic()
        if self._written != asdict(self._progress):
            try:
                self._progress.write(self._folder)
                self._written = asdict(self._progress)
            except OSError as error:
                self._warn(f"{self._folder / TRACKING} is not written: {first_line(error)}")


def log_result(
    experiment: str,
    name: str,
    *,
    parent: str = "",
    params: Mapping[str, Any],
    metrics: Iterable[tuple[Mapping[str, float], int]],
    artifacts: Mapping[str, Any],
) -> None:
    """Record the result of a short job as one MLflow run; waits at most 30 seconds for the store.

    The arguments are those of `MlflowTracker`; each of `metrics` are values with their step
    (samples seen), and `artifacts` are files, folders or JSON objects by artifact name.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for values, step in metrics:
            row = {**values, "samples_seen": step, "time": time.time()}
            files.append_line(Path(folder, METRICS), row)
        files.append_line(Path(folder, EVENTS), {"event": name, "artifacts": artifacts})
        tracker = MlflowTracker(Path(folder), experiment, name, params=params, parent=parent)
        tracker.finish(unsent="are lost")


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def _encodable(value: Any) -> str:
    """`value` as text that any store can encode."""
    return str(value).encode("utf-8", "backslashreplace").decode()
