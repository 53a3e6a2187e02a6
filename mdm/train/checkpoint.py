"""Committed checkpoints: a folder counts once its marker names the hash of its file list.

    run_dir/checkpoints/step-00000500/
      main/            DeepSpeed's ZeRO shards
      ema/             the averaged weights in the same layout
      loader/          one file a rank
      state.json       TrainState
      manifest.json    path -> bytes, sha256 of all of the above
      COMMITTED        sha256 of manifest.json, written last

Everything is written under a temporary name, synced, hashed and agreed on by all ranks before the
folder gets its name and, last, its marker. Killed anywhere in between, the former checkpoint holds.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed

from mdm.dist import World, gather_to_all
from mdm.train.ema import EMA
from mdm.train.engine import Engine
from mdm.train.state import TrainState

MARKER = "COMMITTED"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk, verified when it was found."""

    path: Path

    @property
    def state(self) -> TrainState:
        """Where the run stood."""
        return TrainState.from_json(json.loads((self.path / "state.json").read_text()))


def write_synced(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all, and have it on the disk on return."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints_of(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def save(
    run_dir: str | Path,
    engine: Engine,
    ema: EMA,
    state: TrainState,
    loader_state: dict[str, Any],
    keep: int,
) -> Path:
    """Commit the run's whole state, drop all but the newest `keep` checkpoints; all ranks call."""
    world = engine.world
    final = checkpoints_of(run_dir) / f"step-{state.step:08d}"
    work = final.with_name(final.name + ".tmp")
    if world.is_main:
        for stale in (work, final):
            shutil.rmtree(stale, ignore_errors=True)
        (work / "loader").mkdir(parents=True)
    torch.distributed.barrier()

    engine.save(work / "main")
    engine.save_alike(work / "ema", work / "main", ema.shadow)
    own = {"loader": loader_state, "ema_updates": ema.updates}
    (work / "loader" / f"rank-{world.rank:05d}.json").write_text(json.dumps(own))
    if world.is_main:
        (work / "state.json").write_text(json.dumps(state.to_json(), indent=1))
    torch.distributed.barrier()

    _commit(work, final, world)
    if world.is_main:
        prune(run_dir, keep)
    torch.distributed.barrier()
    return final


def _commit(work: Path, final: Path, world: World) -> None:
    """Sync and hash (shared among the ranks), agree, name, mark."""
    entries: dict[str, dict[str, Any]] = {}
    failure = ""
    try:
        for path in _files(work)[world.rank :: world.size]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[str(path.relative_to(work))] = {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
    except OSError as error:
        failure = f"rank {world.rank}: {error}"
    votes = gather_to_all((failure, entries))
    failures = [vote for vote, _ in votes if vote]
    if failures:
        raise OSError(f"checkpoint {final.name} is not committed: {'; '.join(failures)}")
    if world.is_main:
        files = {name: entry for _, part in votes for name, entry in part.items()}
        manifest = json.dumps({"files": dict(sorted(files.items()))}, indent=1).encode()
        write_synced(work / "manifest.json", manifest)
        for folder in (p for p in work.rglob("*") if p.is_dir()):
            sync_folder(folder)
        work.rename(final)
        sync_folder(final.parent)
        write_synced(final / MARKER, hashlib.sha256(manifest).hexdigest().encode())
    torch.distributed.barrier()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def why_invalid(path: Path) -> str:
    """The first reason not to trust a checkpoint; empty for a valid one."""
    marker, manifest = path / MARKER, path / "manifest.json"
    if not marker.is_file() or not manifest.is_file():
        return "it was never committed"
    if sha256_of(manifest) != marker.read_text():
        return "manifest.json is not the one that was committed"
    files: dict[str, dict[str, Any]] = json.loads(manifest.read_text())["files"]
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256_of(file) != entry["sha256"]:
            return f"{name} has changed since it was committed"
    return ""


def newest_first(run_dir: str | Path) -> Iterator[Path]:
    """Folders that bear a checkpoint's name, valid or not."""
    found = checkpoints_of(run_dir).glob("step-" + "[0-9]" * 8)
    yield from sorted(found, reverse=True)


def latest_valid(run_dir: str | Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose every byte verifies, and why newer ones were passed over."""
    passed: list[tuple[Path, str]] = []
    for path in newest_first(run_dir):
        reason = why_invalid(path)
        if not reason:
            return Checkpoint(path), passed
        passed.append((path, reason))
    return None, passed


def set_aside(path: Path) -> None:
    """Rename a folder so that nothing counts it any more; it stays for whoever wants to look."""
    if path.exists():
        n = len(list(path.parent.glob(f"{path.name}.aside-*")))
        path.rename(path.with_name(f"{path.name}.aside-{n}"))


def restore(checkpoint: Checkpoint, engine: Engine, ema: EMA) -> dict[str, Any]:
    """Load weights, optimizer and averaged weights; returns this rank's loader state."""
    engine.load(checkpoint.path / "main")
    own = json.loads(
        (checkpoint.path / "loader" / f"rank-{engine.world.rank:05d}.json").read_text()
    )
    ema.load(engine.load_alike(checkpoint.path / "ema"), own["ema_updates"])
    loader_state: dict[str, Any] = own["loader"]
    return loader_state


def prune(run_dir: str | Path, keep: int) -> None:
    """Remove uncommitted leftovers and all but the newest `keep` checkpoints."""
    for leftover in checkpoints_of(run_dir).glob("step-*.tmp"):
        shutil.rmtree(leftover)
    for path in list(newest_first(run_dir))[max(keep, 1) :]:
        (path / MARKER).unlink(missing_ok=True)  # first: a half-removed one must not look whole
        shutil.rmtree(path)
