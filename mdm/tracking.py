"""The one door to MLflow: runs, parameters, metrics keyed by samples seen, artifacts.

Training must never wait for a tracking server, nor end because of one. So everything goes into a
journal on disk, and a thread of its own brings it to the server, trying again for as long as the
run lives. What is left then is brought by the next attempt, or by running a finished job again.
"""

import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mdm.journal import Journal

log = logging.getLogger("mdm")

DEFAULT_STORE = "runs/mlflow.db"
_PARAM_LENGTH = 6000  # MLflow refuses longer values
_PARAMS_A_CALL = 100  # and more than this many a call
_METRICS_A_CALL = 1000
# What a server answers to an entry that it will never take.
_HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


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
        parent: "MlflowTracker | None" = None,
        on_start: Callable[[str], None] | None = None,
        journal: Path | None = None,
    ) -> None:
        self._experiment, self._name = experiment, name
        self._uri = uri or default_uri()
        self._wanted_id, self._parent, self._on_start = run_id, parent, on_start
        self._run_id: str | None = None
        self._known: dict[str, int] = {}  # the last step of each metric that the store has
        self._scratch = tempfile.TemporaryDirectory() if journal is None else None
        self._journal = Journal(journal or Path(self._scratch.name))  # type: ignore[union-attr]
        self._news, self._ending, self._closing = (threading.Event() for _ in range(3))
        self._dropped = False
        self._warned = False
        self._client: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None until the store has answered once."""
        return self._run_id or self._wanted_id

    @property
    def waiting(self) -> int:
        """Bytes of entries that the store has not taken yet."""
        return len(self._journal)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the resolved configuration, flat."""
        texts = {key: str(value)[:_PARAM_LENGTH] for key, value in params.items()}
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
        self._put({"kind": "text", "text": text, "path": path})

    def child(self, name: str) -> Tracker:
        """A run below this one."""
        return MlflowTracker(self._experiment, name, uri=self._uri, parent=self)

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
        if self._journal.append(entry):
            self._news.set()
        elif not self._dropped:
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
            self._deliver()
        finally:
            self._journal.close()

    def _deliver(self) -> None:
        self._insist(self._open)
        while not self._closing.is_set():
            self._news.clear()
            waiting = self._journal.waiting()
            if not waiting:
                if self._ending.is_set():
                    return
                self._news.wait()
                continue
            entry, end, backlog = waiting[0]
            if entry["kind"] == "metrics":  # what has piled up goes in few calls
                lines, end = _leading_metrics(waiting)
                written = self._insist(lambda lines=lines: self._write_metrics(lines))  # type: ignore[misc]
            else:
                stale = entry["kind"] == "status" and backlog  # how a former attempt ended
                written = stale or self._insist(lambda entry=entry: self._write(entry))  # type: ignore[misc]
            if written:
                self._journal.take(end)

    def _insist(self, task: Callable[[], None]) -> bool:
        """Run `task` until it succeeds or the job ends; a store's trouble is no reason to stop."""
        pause = 1.0
        while not self._closing.is_set():
            try:
                task()
                self._warned = False
                return True
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                first = (str(error).splitlines() or [""])[0][:200]
                if getattr(error, "error_code", "") in _HOPELESS:
                    self._warn(f"an entry is refused and dropped: {first}", again=True)
                    return True
                self._warn(f"{type(error).__name__}: {first}")
                # One that ends soon asks more often: its server may be back in time.
                self._closing.wait(1.0 if self._ending.is_set() else pause)
                pause = min(2 * pause, 30.0)
        return False

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
        if self._wanted_id is not None and self._resume(self._wanted_id):
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

    def _resume(self, run_id: str) -> bool:
        """Continue a run; False if this store does not know it."""
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        self._client.update_run(run_id, status="RUNNING")
        self._run_id = run_id
        self._known = {m.key: m.step for m in run.data._metric_objs}
        return True

    def _write(self, entry: dict[str, Any]) -> None:
        kind = entry["kind"]
        if kind == "params":
            self._write_params(entry["params"])
        elif kind == "artifact":
            self._write_artifact(Path(entry["path"]), entry["folder"])
        elif kind == "text":
            self._client.log_text(self._run_id, entry["text"], entry["path"])
        else:
            self._client.set_terminated(self._run_id, status=entry["status"])

    def _write_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        rows = [
            Param(key, value)
            for key, value in params.items()
            if key not in known  # MLflow's parameters cannot change: a resumed run keeps its first
        ]
        for start in range(0, len(rows), _PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=rows[start : start + _PARAMS_A_CALL])

    def _write_metrics(self, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        # A resumed run repeats the steps since its checkpoint, bit for bit.
        rows, known = [], dict(self._known)
        for line in lines:
            for key, value in line["metrics"].items():
                if line["step"] > known.get(key, -1):
                    rows.append(Metric(key, value, line["time"], line["step"]))
                    known[key] = line["step"]
        if rows:
            self._client.log_batch(self._run_id, metrics=rows)
            self._known = known

    def _write_artifact(self, path: Path, folder: str) -> None:
        if not path.exists():
            log.warning("MLflow: %s is gone and was not recorded", path)
            return
        write = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        write(self._run_id, str(path), folder or None)


def _leading_metrics(
    waiting: list[tuple[dict[str, Any], int, bool]],
) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics before anything else, as many as one call takes, and where they end."""
    lines: list[dict[str, Any]] = []
    end, values = 0, 0
    for entry, after, _ in waiting:
        values += len(entry.get("metrics", ()))
        if entry["kind"] != "metrics" or (lines and values > _METRICS_A_CALL):
            break
        lines.append(entry)
        end = after
    return lines, end
