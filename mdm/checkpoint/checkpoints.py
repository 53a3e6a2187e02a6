"""Committed checkpoints in a folder or an S3 bucket: which exist, are valid, and are kept.

    step-00000500/
      CLAIM                  when writing began; no name is written to twice
      rank-00000.json        what this rank's share consists of
      rank-00000/KIND.0000   its numbers, raw fp32, 64 MiB an object
      rank-00000/buffers     its module's buffers (safetensors)
      manifest.json          format, TrainState, loader state, shapes, size and hash of all of these
      COMMITTED              sha256 of manifest.json, written last, after all ranks agreed
      ASIDE                  if it is set aside: why it must not be used

KIND is weights, exp_avg, exp_avg_sq, ema and, if there is a second average, ema2.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mdm.checkpoint.snapshot import DamagedError, fetch, in_threads
from mdm.checkpoint.state import RunError, TrainState
from mdm.config import Config
from mdm.storage import MissingObjectError, Store, join, open_store

FORMAT = 2  # 1 was DeepSpeed's own layout
MARKER, MANIFEST, CLAIM, ASIDE = "COMMITTED", "manifest.json", "CLAIM", "ASIDE"
_NAME = re.compile(r"step-\d{8}(\.\d+)?")
_KEY = re.compile(rf"{CLAIM}|{MANIFEST}|{MARKER}|{ASIDE}|rank-\d{{5}}(\.json|/[a-z0-9_]+(\.\d+)?)")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints to keep."""

    newest: int = 2
    every: int = 0  # steps; 0 for none
    best: bool = False  # also the one with the lowest loss

    @classmethod
    def of(cls, config: Config) -> "Keep":
        """As a run is configured."""
        train = config.train
        return cls(train.keep, train.keep_every, train.keep_best)


@dataclass(frozen=True)
class Record:
    """The manifest of a committed checkpoint; none of its weights are read yet."""

    name: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.manifest["state"]["step"])

    @property
    def state(self) -> TrainState:
        """The run's state, as a fresh copy."""
        return TrainState.from_json(json.loads(json.dumps(self.manifest["state"])))

    @property
    def loss(self) -> float:
        """Mean loss of the last line of metrics before it; infinite if there was none."""
        loss = self.manifest["state"].get("loss")
        return float("inf") if loss is None else float(loss)

    @property
    def averages(self) -> list[str]:
        """The kinds of averaged weights that it holds."""
        return list(self.manifest["averages"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and hash by key."""
        files: dict[str, dict[str, Any]] = self.manifest["files"]
        return files


def uri_of(config: Config) -> str:
    """The URI of a run's checkpoints."""
    return config.train.checkpoints or join(config.run_dir, "checkpoints")


class Checkpoints:
    """The checkpoints below one URI, used by a single process.

    `confirm` is called before each change; it raises if another job has taken the lease.
    """

    def __init__(self, store: Store, confirm: Callable[[], None] = lambda: None) -> None:
        self.store, self.confirm = store, confirm
        self._cache: dict[str, Record] = {}

    @classmethod
    def at(cls, uri: str) -> "Checkpoints":
        """The checkpoints in a folder or below `s3://bucket/prefix`."""
        return cls(open_store(uri))

    def contents(self, prefix: str = "step-") -> dict[str, set[str]]:
        """Keys by checkpoint, newest first, valid or not; other objects are left out."""
        keys: dict[str, set[str]] = {}
        for key in self.store.listing(prefix):
            name, _, rest = key.partition("/")
            if _NAME.fullmatch(name) and _KEY.fullmatch(rest):
                keys.setdefault(name, set()).add(rest)
        return dict(sorted(keys.items(), key=lambda item: _order(item[0]), reverse=True))

    def read(self, name: str) -> Record:
        """The manifest of a checkpoint.

        Raises:
            DamagedError: it was never committed, or its manifest is not the committed one.
            RunError: it is of another format; the message names both.
        """
        try:
            marker = self.store.get(f"{name}/{MARKER}")
            data = self.store.get(f"{name}/{MANIFEST}")
        except MissingObjectError:
            raise DamagedError("it was never committed") from None
        if hashlib.sha256(data).hexdigest() != marker.decode(errors="replace"):
            raise DamagedError("manifest.json is not the one that was committed")
        manifest = json.loads(data)
        if (written := manifest.get("format", 1)) != FORMAT:
            raise RunError(
                f"{join(self.store.uri, name)} has checkpoint format {written}, this version reads "
                f"format {FORMAT}; finish the run with the version that began it, or give another "
                "--run_dir, or --resume none to start over"
            )
        return Record(name, manifest)

    def newest_first(self) -> tuple[list[Record], list[tuple[str, str]]]:
        """Committed checkpoints, by their manifests alone, and why others are skipped.

        One whose manifest is damaged is set aside.
        """
        records, skipped = [], []
        for name, keys in self.contents().items():
            if ASIDE in keys:
                continue
            try:
                records.append(self.read(name))
            except DamagedError as error:
                skipped.append((name, str(error)))
                if MARKER in keys:
                    self.set_aside(name, str(error))
        return records, skipped

    def why_invalid(self, name: str) -> str:
        """Why a checkpoint is invalid, after reading every byte; empty if it is valid."""
        try:
            record = self.read(name)
            in_threads(lambda f: len(fetch(self.store, *f)), record.files.items())
        except DamagedError as error:
            return str(error)
        return ""

    def sweep(self) -> None:
        """Remove half-written objects of killed jobs; only the job with the lease may call it."""
        self.confirm()
        self.store.sweep("step-")

    def claim(self, step: int) -> str:
        """Reserve a name for a checkpoint of `step` that was never written to."""
        self.confirm()
        now = str(int(time.time())).encode()
        name, n = f"step-{step:08d}", 0
        while self.contents(f"{name}/") or not self.store.put(
            f"{name}/{CLAIM}", now, if_absent=True
        ):
            n += 1
            name = f"step-{step:08d}.{n}"
        return name

    def commit(self, name: str, manifest: dict[str, Any]) -> None:
        """Write the manifest, then the marker, which makes the checkpoint valid."""
        self.confirm()
        data = json.dumps({"format": FORMAT} | manifest, indent=1).encode()
        self.store.put(f"{name}/{MANIFEST}", data)
        self.store.put(f"{name}/{MARKER}", hashlib.sha256(data).hexdigest().encode())

    def set_aside(self, name: str, reason: str) -> None:
        """Exclude a checkpoint from use; its files stay for inspection."""
        self.confirm()
        self.store.put(f"{name}/{ASIDE}", reason.encode())

    def set_all_aside(self, reason: str) -> None:
        """Exclude all checkpoints, so that a run starts over beside them."""
        for name, keys in self.contents().items():
            if ASIDE not in keys:
                self.set_aside(name, reason)

    def roll_back(self, step: int) -> Iterator[str]:
        """Set aside the checkpoints after `step`, and yield their names.

        Raises:
            ValueError: there is no valid checkpoint of `step`, from which the run would resume.
        """
        records, _ = self.newest_first()
        if step not in (steps := [record.step for record in records]):
            raise ValueError(f"--to is {step}; there are checkpoints of steps {steps}")
        for record in records:
            if record.step > step:
                self.set_aside(record.name, f"rolled back to step {step}")
                yield record.name

    def remove(self, name: str) -> None:
        """Delete a checkpoint, its marker first: half-removed, it must not look valid."""
        self.confirm()
        self.store.delete(f"{name}/{MARKER}")
        for key in self.contents(f"{name}/").get(name, ()):
            self.store.delete(f"{name}/{key}")

    def prune(self, keep: Keep, *, asides: bool = False) -> list[str]:
        """Remove what `keep` does not keep, and what was never committed; returns the names.

        An uncommitted checkpoint that is newer than all committed ones may still be being written:
        like those set aside, it is removed only with `asides`. Checkpoints whose manifest cannot be
        read stay.
        """
        records: list[Record] = []
        names: list[str] = []  # to remove
        for name, keys in self.contents().items():
            if ASIDE in keys:
                names += [name] if asides else []
            elif MARKER not in keys:
                names += [name] if records or asides else []
            else:
                with suppress(DamagedError, RunError):
                    if name not in self._cache:
                        self._cache[name] = self.read(name)
                    records.append(self._cache[name])
        kept = kept_of(records, keep)
        names += [record.name for record in records if record.name not in kept]
        for name in names:
            self.remove(name)
        return names


def kept_of(newest_first: Sequence[Record], keep: Keep) -> set[str]:
    """The names that `keep` keeps, always including the newest."""
    kept = {record.name for record in newest_first[: max(keep.newest, 1)]}
    if keep.every:
        kept |= {record.name for record in newest_first if record.step % keep.every == 0}
    if keep.best and newest_first:
        kept.add(min(newest_first, key=lambda record: record.loss).name)
    return kept


def _order(name: str) -> tuple[int, int]:
    step, _, n = name.removeprefix("step-").partition(".")
    return int(step), int(n or 0)
