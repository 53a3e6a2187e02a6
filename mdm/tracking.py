"""The one door to MLflow: runs, parameters, metrics keyed by samples seen, artifacts.

Training must never wait for a tracking server, nor end because of one. So everything goes through
a bounded queue to a thread of its own, which retries while the run lives; what does not fit, or is
left when the run ends, is dropped with one warning.
"""

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("mdm")

DEFAULT_STORE = "runs/mlflow.db"
QUEUE_LENGTH = 10_000
_PARAM_LENGTH = 6000  # MLflow refuses longer values
_PARAMS_A_CALL = 100  # and more than this many a call


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

    def child(self, name: str) -> Tracker:
        """Another null tracker."""
        return NullTracker()

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """Do nothing."""


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite store under `runs/`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_STORE).absolute()}"


class MlflowTracker:
    """One MLflow run, written by a background thread. See `Tracker` for the methods."""

    def __init__(
        self,
        experiment: str,
        name: str,
        run_id: str | None = None,
        uri: str | None = None,
        parent: "MlflowTracker | None" = None,
        on_start: Callable[[str], None] | None = None,
    ) -> None:
        self._experiment, self._name = experiment, name
        self._uri = uri or default_uri()
        self._wanted_id, self._parent, self._on_start = run_id, parent, on_start
        self._run_id: str | None = None
        self._known_step = -1
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._closing = threading.Event()
        self._dropped = 0
        self._warned = False
        self._client: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None until the store has answered once."""
        return self._run_id or self._wanted_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the resolved configuration, flat."""
        self._put(lambda: self._write_params(dict(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record floats at `step` in one call to the store."""
        now, values = int(time.time() * 1000), dict(metrics)
        self._put(lambda: self._write_metrics(values, step, now))

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a file, or a whole folder, under `folder`."""
        self._put(lambda: self._write_artifact(Path(path), folder))

    def child(self, name: str) -> Tracker:
        """A run below this one."""
        return MlflowTracker(self._experiment, name, uri=self._uri, parent=self)

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """Close the run; what the store has not taken after `timeout` seconds is dropped."""
        self._put(lambda: self._client.set_terminated(self._run_id, status=status))
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(timeout)
        self._closing.set()
        if self._thread.is_alive():
            self._warn(f"{self._queue.qsize()} entries could not be written before the job ended")

    def _put(self, task: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                log.warning("MLflow's queue is full: entries are dropped from now on")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            # A URI may carry a password, and errors repeat it.
            shown = re.sub(r"//[^/@\s]*@", "//", f"MLflow at {self._uri}: {message}")
            log.warning("%s; training goes on", shown)

    def _work(self) -> None:
        self._insist(self._open)
        while (task := self._queue.get()) is not None:
            self._insist(task)

    def _insist(self, task: Callable[[], None]) -> None:
        """Run `task` until it succeeds or the job ends; a store's trouble is no reason to stop."""
        pause = 1.0
        while not self._closing.is_set():
            try:
                task()
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                first = (str(error).splitlines() or [""])[0][:200]
                self._warn(f"{type(error).__name__}: {first}")
                self._closing.wait(pause)
                pause = min(2 * pause, 30.0)

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        for name in ("alembic", "mlflow.store.db"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if self._uri.startswith("sqlite:///"):
            Path(self._uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        # Imported here: it takes seconds, and only rank 0 of a tracked job needs it.
        import mlflow
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        if self._wanted_id is not None:
            self._resume(self._wanted_id)
            return
        tags = {}
        if self._parent is not None:
            while self._parent.run_id is None:
                if self._closing.wait(0.1):
                    return
            tags[MLFLOW_PARENT_RUN_ID] = self._parent.run_id
        found = self._client.create_run(self._experiment_id(), tags=tags, run_name=self._name)
        self._run_id = str(found.info.run_id)
        if self._on_start is not None:
            self._on_start(self._run_id)

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self._uri.startswith("sqlite:///"):
            location = (
                Path(self._uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
            ).as_uri()
        return str(self._client.create_experiment(self._experiment, artifact_location=location))

    def _resume(self, run_id: str) -> None:
        run = self._client.get_run(run_id)
        self._client.update_run(run_id, status="RUNNING")
        self._run_id = run_id
        for key in run.data.metrics:
            steps = [m.step for m in self._client.get_metric_history(run_id, key)]
            self._known_step = max(self._known_step, *steps)

    def _write_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        rows = [
            Param(key, str(value)[:_PARAM_LENGTH])
            for key, value in params.items()
            if key not in known  # MLflow's parameters cannot change: a resumed run keeps its first
        ]
        for start in range(0, len(rows), _PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=rows[start : start + _PARAMS_A_CALL])

    def _write_metrics(self, values: dict[str, float], step: int, when: int) -> None:
        from mlflow.entities import Metric

        if step <= self._known_step:
            return  # a resumed run repeats the steps since its checkpoint, bit for bit
        rows = [Metric(key, float(value), when, step) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def _write_artifact(self, path: Path, folder: str) -> None:
        write = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        write(self._run_id, str(path), folder or None)
