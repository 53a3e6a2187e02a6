"""One run in an MLflow store: found, restored or created, and written to.

The one door to MLflow. Nothing here waits or tries again; `mdm.utils.tracking` does. Errors are
those of MLflow, except for an entry that the store will never take: it is dropped alone, and one
line says so.
"""

import errno
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PARAMS_A_CALL = 100  # MLflow refuses more a call
# What a store answers to an entry that it does not take, or that its run is not there for.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
# And to a name or a restoration that it does not allow.
_FORBIDDEN = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED", "NOT_IMPLEMENTED")
_NO_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# What no later try mends: an artifact's path, or a value that cannot be sent.
_UNSOUND = (ValueError, TypeError, KeyError, OverflowError)
_NO_PATH = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EISDIR)
_PATIENCE = 3  # failures of one entry, in a store that takes others, before it is dropped
_KEY = "mdm.key"  # the tag by which a run is found again


def import_mlflow() -> None:
    """Import mlflow, quietly; raises whatever a missing or broken installation raises."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Imported in functions: it takes seconds, and only rank 0 of a tracked job needs it.
    import mlflow  # noqa: F401

    # What fails is told in a line of our own; theirs are stack traces. The import sets levels.
    for name in ("alembic", "mlflow.store.db"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class RunChanged(Exception):
    """The run was restored, or `anew`, made anew: what waits is to be brought again."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.anew = anew


class MlflowRun:
    """The run of a job, by its id if one is known, else by its key.

    Args:
        uri: the store.
        experiment: name of the experiment; restored if it was deleted.
        name: name of the run, should it be created.
        run_id: the run to go on with, if the store has it.
        parent: gives the id of the run above, or None for none; raises while it is not known.
        key: gives the key, which is on disk before a run is created.
        warn: takes lines for people.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        run_id: str | None,
        parent: Callable[[], str | None],
        key: Callable[[], str],
        warn: Callable[[str], None],
    ) -> None:
        self._uri, self._experiment, self._name = uri, experiment, name
        self._wanted, self._parent, self._key, self._warn = run_id, parent, key, warn
        self.run_id: str | None = None
        self.is_new = False  # whether `open` had to create it
        self._known: dict[str, int] = {}  # the last step of each metric that the store has
        self._refused: set[str] = set()  # names that the store does not take
        self._client: Any = None

    def connect(self) -> None:
        """Find this job's run and set it RUNNING, or create it."""
        if self._client is None:
            import mlflow

            if self._uri.startswith("sqlite:///"):
                Path(self._uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        if self._wanted is not None and self._resume(self._wanted):
            return
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        tags, parent = {_KEY: self._key()}, self._parent()
        if parent is not None:
            tags[MLFLOW_PARENT_RUN_ID] = parent
        experiment = self._experiment_id()
        found = self._find(tags[_KEY], experiment)
        if found is not None and self._resume(found):
            return
        created = self._client.create_run(experiment, tags=tags, run_name=self._name)
        self.run_id, self.is_new, self._known = str(created.info.run_id), True, {}

    def bring(self, entries: Sequence[dict[str, Any]], failures: int) -> None:
        """Write entries of one kind: one, or lines of metrics. `failures` of them went before.

        Raises:
            RunChanged: the run was the trouble, and is not any more.
        """
        if self.run_id is None:
            self.connect()
            self._warn(f"run {self.run_id} takes the place of {self._wanted}, which is gone")
            raise RunChanged(anew=True)
        kind, first = entries[0]["kind"], entries[0]
        if kind == "metrics":
            self._write_metrics(entries, failures)
        elif kind == "params":
            self._write_params(first["params"], failures)
        else:
            try:
                self._write(first)
            except Exception as error:  # noqa: BLE001 - `_blame` raises what is not the entry's
                self._blame(error, failures)
                self._drop(f"{kind} {first.get('path', '')}".strip(), error)

    def _blame(self, error: Exception, failures: int) -> None:
        """Return if the entry is to blame; else raise, to have it brought again."""
        if isinstance(error, OSError):
            if not isinstance(error, _NO_PATH) and error.errno not in _NO_NAME:
                raise error
            return
        if isinstance(error, _UNSOUND):
            return
        refused = _code(error) in _REFUSALS
        if not refused and (_code(error) != "INTERNAL_ERROR" or failures < _PATIENCE):
            raise error
        self._check_run()
        if not refused:  # a store that takes something else is not the trouble
            self._client.set_tag(self.run_id, _KEY, self._key())

    def _check_run(self) -> None:
        """Restore the run if it was deleted, or give it up; RunChanged says so."""
        run_id = str(self.run_id)
        run = self._get_run(run_id)
        if run is not None and run.info.lifecycle_stage == "active":
            return
        if run is None or not self._resume(run_id):
            self._wanted, self.run_id = run_id, None  # the next entry opens another
        raise RunChanged(anew=False)

    def _find(self, key: str, experiment: str) -> str | None:
        """The id of the run with this key, deleted or not."""
        from mlflow.entities import ViewType

        found = self._client.search_runs(
            [experiment], f"tags.`{_KEY}` = '{key}'", ViewType.ALL, max_results=1
        )
        return str(found[0].info.run_id) if found else None

    def _experiment_id(self) -> str:
        """The experiment, restored or created; under another name if the store wants it so."""
        wanted, refusal = self._experiment, ""
        others = [f"{(wanted.strip() or 'mdm')[:400]}-{n}" for n in range(2, 10)]
        for name in (wanted, *others):
            try:
                found = self._experiment_of(name)
            except Exception as error:
                if _code(error) not in _FORBIDDEN or name == others[-1]:
                    raise
                refusal = refusal or first_line(error)
                continue
            if name != wanted:
                self._warn(f"experiment {wanted!r} cannot be used ({refusal}): {name!r} is used")
            break
        return found

    def _experiment_of(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            self._restore_experiment(found)
            return str(found.experiment_id)
        location = None
        if self._uri.startswith("sqlite:///"):
            location = (
                Path(self._uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
            ).as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    def _restore_experiment(self, found: Any) -> None:
        if found.lifecycle_stage != "active":
            self._client.restore_experiment(found.experiment_id)
            self._warn(f"experiment {found.name!r} was deleted: it is restored")

    def _get_run(self, run_id: str) -> Any:
        """The run, deleted or not; None if this store does not know it."""
        try:
            return self._client.get_run(run_id)
        except Exception as error:
            if _code(error) in _NO_SUCH:
                return None
            raise

    def _resume(self, run_id: str) -> bool:
        """Continue a run, restored where need be; False if this store has it no more."""
        run = self._get_run(run_id)
        if run is None:
            return False
        if run.info.lifecycle_stage != "active":
            try:
                self._restore(run)
            except Exception as error:
                if _code(error) not in _FORBIDDEN:
                    raise
                self._warn(f"run {run_id} cannot be restored: {first_line(error)}")
                return False
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, _KEY, self._key())
        self.run_id = run_id
        self._known = {m.key: m.step for m in run.data._metric_objs}
        return True

    def _restore(self, run: Any) -> None:
        run_id = run.info.run_id
        self._restore_experiment(self._client.get_experiment(run.info.experiment_id))
        # An experiment takes its runs along.
        if self._client.get_run(run_id).info.lifecycle_stage != "active":
            self._client.restore_run(run_id)
        self._warn(f"run {run_id} was deleted: it is restored")

    def _drop(self, what: str, error: Exception) -> None:
        self._warn(f"{what} is refused and dropped: {type(error).__name__}: {first_line(error)}")

    def _write(self, entry: dict[str, Any]) -> None:
        kind = entry["kind"]
        if kind == "artifact":
            self._write_artifact(Path(entry["path"]), entry["folder"])
        elif kind == "text":
            self._client.log_text(self.run_id, entry["text"], entry["path"])
        elif kind == "former":
            self._end_former(entry["run_id"], entry["key"])
        else:
            self._client.set_terminated(self.run_id, status=entry["status"])

    def _end_former(self, run_id: str, key: str) -> None:
        found = run_id or (key and self._find(key, self._experiment_id()))
        run = self._get_run(found) if found and found != self.run_id else None
        if run and run.info.status == "RUNNING" and run.info.lifecycle_stage == "active":
            self._client.set_terminated(found, status="KILLED")

    def _write_params(self, params: dict[str, Any], failures: int) -> None:
        from mlflow.entities import Param

        run = self._get_run(str(self.run_id))
        known = run.data.params if run is not None else {}
        rows = [
            Param(key, value)
            for key, value in params.items()
            if key not in known  # MLflow's parameters cannot change: a resumed run keeps its first
        ]
        for start in range(0, len(rows), _PARAMS_A_CALL):
            self._write_rows("params", rows[start : start + _PARAMS_A_CALL], failures)

    def _write_metrics(self, lines: Sequence[dict[str, Any]], failures: int) -> None:
        from mlflow.entities import Metric

        # A resumed run repeats the steps since its checkpoint, bit for bit.
        rows, known = [], dict(self._known)
        for line in lines:
            for key, value in line["metrics"].items():
                if line["step"] > known.get(key, -1) and key not in self._refused:
                    rows.append(Metric(key, value, line["time"], line["step"]))
                    known[key] = line["step"]
        if rows:
            self._write_rows("metrics", rows, failures)
            self._known = known

    def _write_rows(self, kind: str, rows: list[Any], failures: int) -> None:
        """Write metrics or params; those that are refused alone are dropped alone."""
        try:
            self._client.log_batch(self.run_id, **{kind: rows})
        except Exception as error:  # noqa: BLE001 - `_blame` raises what is not the entry's
            self._blame(error, failures)
            if len(rows) > 1:
                half = len(rows) // 2
                self._write_rows(kind, rows[:half], failures)
                self._write_rows(kind, rows[half:], failures)
            elif rows[0].key not in self._refused:
                self._refused.add(rows[0].key)
                self._drop(f"{kind[:-1]} {rows[0].key!r}", error)

    def _write_artifact(self, path: Path, folder: str) -> None:
        if not path.exists():
            self._warn(f"{path} is gone and was not recorded")
            return
        write = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        write(self.run_id, str(path), folder or None)


def _code(error: Exception) -> str:
    return str(getattr(error, "error_code", ""))


def first_line(error: Exception) -> str:
    """The beginning of what an error says; of SQLAlchemy's, the database's own words."""
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result")]
    return (lines or [""])[0][:200]
