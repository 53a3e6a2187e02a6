"""One run in an MLflow store: found, restored or created, and written to.

This is the only module that imports mlflow. Nothing here waits or retries; `mdm.utils.tracking`
does. An entry that the store will never accept is dropped, with a warning.
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

_PARAMS_A_CALL = 100  # MLflow's limit
# Error codes for an entry that the store rejects, or whose run is missing.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
# Error codes for a name or a restoration that the store does not allow.
_FORBIDDEN = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED", "NOT_IMPLEMENTED")
_NO_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# Errors that no retry fixes: an artifact's path, or a value that cannot be sent.
_UNSOUND = (ValueError, TypeError, KeyError, OverflowError)
_NO_PATH = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EISDIR)
# An entry is dropped after this many failures in a store that accepts others.
_PATIENCE = 3
_KEY = "mdm.key"  # the tag by which a run is found again


def import_mlflow() -> None:
    """Import mlflow without log noise; raises whatever a missing or broken installation raises."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Imported in functions: it takes seconds, and only rank 0 of a tracked job needs it.
    import mlflow  # noqa: F401

    # We log failures in one line; these loggers print stack traces. The import sets their levels.
    for name in ("alembic", "mlflow.store.db"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class RunChanged(Exception):
    """The run was restored or replaced: send the entries again."""


class MlflowRun:
    """The MLflow run of a job, found by `run_id` if that is known, else by `key`, else created.

    All that is written goes through `send`. `uri`, `experiment`, `name` and `parent` are those of
    `MlflowTracker`. The key must be on disk before `connect` creates the run. `warn` logs a line.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        *,
        run_id: str,
        parent: str,
        key: str,
        warn: Callable[[str], None],
    ) -> None:
        self._uri, self._experiment, self._name = uri, experiment, name
        file = uri.removeprefix("sqlite:///")
        self._folder = Path(file).parent if file != uri else None  # of a SQLite store
        self._known_id, self._parent, self._key, self._warn = run_id, parent, key, warn
        self.run_id = ""
        self.is_new = False  # whether `connect` had to create the run
        self._failures = 0  # of the present entry
        self._last_steps: dict[str, int] = {}  # the last step of each metric in the store
        self._refused: set[str] = set()  # names that the store does not accept
        self._client: Any = None

    def connect(self) -> None:
        """Find this job's run and set it RUNNING, or create it."""
        if self._client is None:
            import mlflow

            if self._folder:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        if self._known_id and self._resume(self._known_id):
            return
        tags = {_KEY: self._key} | ({"mlflow.parentRunId": self._parent} if self._parent else {})
        experiment = self._experiment_id()
        run_id = self._find(self._key, experiment)
        if run_id and self._resume(run_id):
            return
        created = self._client.create_run(experiment, tags=tags, run_name=self._name)
        self.run_id, self.is_new, self._last_steps = str(created.info.run_id), True, {}

    def send(self, write: Callable[..., None], *content: Any, failures: int) -> None:
        """Write an entry by a method `log_*` or `end*`, after `failures` failed attempts.

        Raises:
            RunChanged: the run was the cause of the failures, and has been restored or replaced.
        """
        if not self.run_id:
            self.connect()
            self._warn(f"run {self.run_id} replaces {self._known_id}, which is gone")
            self.is_new = True  # even if it was found by its key: it may lack entries
            raise RunChanged
        self._failures = failures
        write(*content)

    @contextmanager
    def _dropped_if_refused(self, entry: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - `_check_blame` re-raises the store's errors
            self._check_blame(error)
            self._warn(f"{entry} is refused and dropped: {first_line(error)}")

    def _check_blame(self, error: Exception) -> None:
        """Return if the entry caused `error`; otherwise raise, so that it is sent again."""
        if isinstance(error, OSError):
            if not isinstance(error, _NO_PATH) and error.errno not in _NO_NAME:
                raise error
            return
        if isinstance(error, _UNSOUND):
            return
        refused = _code(error) in _REFUSALS
        if not refused and (_code(error) != "INTERNAL_ERROR" or self._failures < _PATIENCE):
            raise error
        self._check_run()
        if not refused:  # if the store accepts something else, the entry is to blame
            self._client.set_tag(self.run_id, _KEY, self._key)

    def _check_run(self) -> None:
        """Raise RunChanged if the run was deleted, after restoring it or giving it up."""
        run = self._get_run(self.run_id)
        if run is not None and run.info.lifecycle_stage == "active":
            return
        if run is None or not self._resume(self.run_id):
            self._known_id, self.run_id = self.run_id, ""  # the next entry opens another
        raise RunChanged

    def _find(self, key: str, experiment: str) -> str:
        """The id of the run with this key, deleted or not; empty if there is none."""
        from mlflow.entities import ViewType

        runs = self._client.search_runs(
            [experiment], f"tags.`{_KEY}` = '{key}'", ViewType.ALL, max_results=1
        )
        return str(runs[0].info.run_id) if runs else ""

    def _experiment_id(self) -> str:
        """The experiment, restored or created; under another name if the store refuses this one."""
        try:
            return self._experiment_named(self._experiment)
        except Exception as error:
            if _code(error) not in _FORBIDDEN:
                raise
            name = f"{(self._experiment.strip() or 'mdm')[:400]}-2"
            reason = first_line(error)
            self._warn(f"experiment {self._experiment!r} cannot be used ({reason}): using {name!r}")
            return self._experiment_named(name)

    def _experiment_named(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            self._restore_experiment(experiment)
            return str(experiment.experiment_id)
        location = (self._folder / "mlflow-artifacts").as_uri() if self._folder else None
        return str(self._client.create_experiment(name, artifact_location=location))

    def _restore_experiment(self, experiment: Any) -> None:
        if experiment.lifecycle_stage != "active":
            self._client.restore_experiment(experiment.experiment_id)
            self._warn(f"experiment {experiment.name!r} was deleted: it is restored")

    def _get_run(self, run_id: str) -> Any:
        """The run, deleted or not; None if this store does not have it."""
        try:
            return self._client.get_run(run_id)
        except Exception as error:
            if _code(error) in _NO_SUCH:
                return None
            raise

    def _resume(self, run_id: str) -> bool:
        """Continue a run, restoring it if necessary; False if the store no longer has it."""
        run = self._get_run(run_id)
        if run is None:
            return False
        if run.info.lifecycle_stage != "active":
            try:
                self._restore_experiment(self._client.get_experiment(run.info.experiment_id))
                # Restoring an experiment restores its runs too.
                if self._client.get_run(run_id).info.lifecycle_stage != "active":
                    self._client.restore_run(run_id)
                self._warn(f"run {run_id} was deleted: it is restored")
            except Exception as error:
                if _code(error) not in _FORBIDDEN:
                    raise
                self._warn(f"run {run_id} cannot be restored: {first_line(error)}")
                return False
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, _KEY, self._key)
        self.run_id = run_id
        self._last_steps = {m.key: m.step for m in run.data._metric_objs}
        return True

    def end(self, status: str) -> None:
        """Close the run with FINISHED, FAILED or KILLED."""
        with self._dropped_if_refused("status"):
            self._client.set_terminated(self.run_id, status=status)

    def end_former(self, run_id: str, key: str) -> None:
        """Close another run, known by its id or by its key, as KILLED if it is RUNNING."""
        with self._dropped_if_refused("former run"):
            run_id = run_id or self._find(key, self._experiment_id())
            run = self._get_run(run_id) if run_id and run_id != self.run_id else None
            if run and run.info.status == "RUNNING" and run.info.lifecycle_stage == "active":
                self._client.set_terminated(run_id, status="KILLED")

    def log_params(self, params: Mapping[str, str]) -> None:
        """Write the parameters that the run does not have; its first values stay."""
        from mlflow.entities import Param

        run = self._get_run(self.run_id)
        known = run.data.params if run is not None else {}
        rows = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(rows), _PARAMS_A_CALL):
            self._write_rows("params", rows[start : start + _PARAMS_A_CALL])

    def log_metrics(self, entries: Sequence[tuple[Mapping[str, float], int, int]]) -> None:
        """Write metrics by name, each with a step and a time in milliseconds."""
        from mlflow.entities import Metric

        # Steps that the run already has are skipped: a resumed run repeats those since its
        # checkpoint bit for bit, and a file may be read again from its first line.
        rows, last_steps = [], dict(self._last_steps)
        for metrics, step, milliseconds in entries:
            for key, value in metrics.items():
                if step > last_steps.get(key, -1) and key not in self._refused:
                    rows.append(Metric(key, value, milliseconds, step))
                    last_steps[key] = step
        if rows:
            self._write_rows("metrics", rows)
            self._last_steps = last_steps

    def _write_rows(self, kind: str, rows: list[Any]) -> None:
        """Write metrics or params; refused ones are found by halving and dropped alone."""
        try:
            self._client.log_batch(self.run_id, **{kind: rows})
        except Exception as error:  # noqa: BLE001 - `_check_blame` re-raises the store's errors
            self._check_blame(error)
            if len(rows) > 1:
                half = len(rows) // 2
                self._write_rows(kind, rows[:half])
                self._write_rows(kind, rows[half:])
            elif rows[0].key not in self._refused:
                self._refused.add(rows[0].key)
                entry = f"{kind[:-1]} {rows[0].key!r}"
                self._warn(f"{entry} is refused and dropped: {first_line(error)}")

    def log_artifact(self, name: str, content: Any) -> None:
        """Upload a folder's files below `name`, or as `name` a file or else a JSON value."""
        with self._dropped_if_refused(f"artifact {name}"):
            if not isinstance(content, Path):
                self._client.log_text(self.run_id, json.dumps(content, indent=1), name)
            elif not content.exists():
                self._warn(f"{content} is gone and was not recorded")
            elif content.is_dir():
                self._client.log_artifacts(self.run_id, str(content), name)
            else:
                folder = str(PurePosixPath(name).parent)
                path = None if folder == "." else folder
                self._client.log_artifact(self.run_id, str(content), path)


def _code(error: Exception) -> str:
    return str(getattr(error, "error_code", ""))


def first_line(error: Exception) -> str:
    """An error's type and first 200 characters; for SQLAlchemy's, the database's own message."""
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result")]
    return f"{type(error).__name__}: {(lines or [''])[0][:200]}"
