"""Asynchronous saving, and restoring, by all ranks of a run together.

Training waits only for the copy to host memory. Then a thread of each rank writes its share. On a
process group of their own, the threads agree on the checkpoint's name, on whether all shares are in
the store, and on the commit. If a save fails, the checkpoint before it stays, the run continues
with a warning, and the next save tries again.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import safetensors.torch
import torch.distributed

from mdm.checkpoint.checkpoints import Checkpoints, Keep, Record
from mdm.checkpoint.snapshot import DamagedError, Snapshot, buffers_key, fetch, write_objects
from mdm.checkpoint.state import RunError, TrainState
from mdm.storage import StoreError
from mdm.train.ema import EMA
from mdm.train.engine import Engine
from mdm.utils.ranks import World, from_main, gather_to_all

# Uploads have time limits of their own; this one is for ranks that are gone.
VOTE_TIMEOUT = timedelta(hours=1)

T = TypeVar("T")


def on_main(task: Callable[[], T], world: World, group: Any = None) -> tuple[T | None, str]:
    """What `task` returns on rank 0, and why it failed, on every rank; all must call."""
    result, failure = None, ""
    if world.is_main:
        try:
            result = task()
        except (RunError, StoreError, OSError) as error:
            failure = str(error) or type(error).__name__
    answer: tuple[T | None, str] = from_main((result, failure), group)
    return answer


def find(
    checkpoints: Checkpoints, resume: str, world: World
) -> tuple[list[Record], list[tuple[str, str]]]:
    """Valid checkpoints, newest first, and names of skipped ones with the reason.

    With `resume` none there are none. All ranks must call, and only in the job that holds the lease
    of the checkpoints. Raises RunError if the store cannot be read or holds another format.
    """

    def read() -> tuple[list[Record], list[tuple[str, str]]]:
        checkpoints.sweep()
        return checkpoints.newest_first() if resume != "none" else ([], [])

    records, failure = on_main(read, world)
    if records is None:
        raise RunError(failure)
    return records


class Saver:
    """Saves and restores one run; every method but `messages` must be called by all ranks."""

    def __init__(
        self, checkpoints: Checkpoints, engine: Engine, ema: EMA, world: World, keep: Keep
    ) -> None:
        self.checkpoints, self.world = checkpoints, world
        self._engine, self._ema, self._keep = engine, ema, keep
        self._snapshot = Snapshot(self._live(), engine.shards.pieces())
        self.nbytes = self._snapshot.nbytes  # host memory
        self._shapes, self._tied = engine.shards.shapes(), engine.shards.tied()
        self._group = torch.distributed.new_group(backend="gloo", timeout=VOTE_TIMEOUT)
        self._thread: Thread | None = None
        self._messages: list[str] = []
        self.figures: dict[str, float] = {}  # seconds of the last save and restore
        self.saved_step = -1  # of the newest checkpoint known to be committed

    def _live(self) -> dict[str, list[torch.Tensor]]:
        return self._engine.shards.live() | self._ema.shadows

    def save(self, state: TrainState, loader_state: dict[str, Any]) -> None:
        """Copy everything that the next attempt needs, and start writing and committing it.

        Waits for the save before it, if that is still being written.
        """
        began = time.perf_counter()
        self.wait()
        self._snapshot.take(self._live())
        manifest = {
            "world_size": self.world.size,
            "state": state.to_json(),
            "loader": loader_state,
            "optimizer_steps": self._engine.shards.optimizer_steps,
            "ema_updates": self._ema.updates,
            "shapes": self._shapes,
            "tied": self._tied,
            "averages": list(self._ema.shadows),
        }
        buffers = safetensors.torch.save(self._engine.shards.buffers())
        # A daemon thread does not keep a failing rank alive; otherwise `wait` waits for it.
        self._thread = Thread(
            target=self._run, args=(manifest, buffers, began), name="mdm-saver", daemon=True
        )
        self._thread.start()
        self.figures["save_blocked_seconds"] = time.perf_counter() - began

    def wait(self) -> None:
        """Return once nothing is being saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def messages(self) -> list[str]:
        """Warnings about saves since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def _run(self, manifest: dict[str, Any], buffers: bytes, began: float) -> None:
        step = manifest["state"]["step"]
        try:
            failure = self._write(manifest, buffers, step)
        except RuntimeError as error:  # of the process group: another rank is gone
            failure = str(error)
        if failure:
            self._messages.append(
                f"warning: step {step} is not saved, the next save tries again: {failure}"
            )
            return
        self.saved_step = step
        self.figures["save_durable_seconds"] = time.perf_counter() - began

    def _write(self, manifest: dict[str, Any], buffers: bytes, step: int) -> str:
        """Write, vote, commit, prune; returns what went wrong, the same on every rank."""
        name, failure = on_main(lambda: self.checkpoints.claim(step), self.world, self._group)
        if name is None:
            return failure
        files: dict[str, dict[str, Any]] = {}
        try:
            files = self._snapshot.write(self.checkpoints.store, name, self.world.rank)
            key = buffers_key(name, self.world.rank)
            files |= write_objects(self.checkpoints.store, {key: buffers})
        except (StoreError, OSError, MemoryError) as error:
            failure = f"rank {self.world.rank}: {error}"
        votes = gather_to_all((failure, files), self._group)
        failures = [vote for vote, _ in votes if vote]

        def commit() -> None:
            if failures:
                self.checkpoints.remove(name)
            else:
                shares = {k: v for _, part in votes for k, v in sorted(part.items())}
                self.checkpoints.commit(name, manifest | {"files": shares})

        _, failure = on_main(commit, self.world, self._group)
        if failures or failure:
            return "; ".join([*failures, failure] if failure else failures)
        _, failure = on_main(lambda: self.checkpoints.prune(self._keep), self.world, self._group)
        if failure:
            self._messages.append(f"warning: old checkpoints are not removed: {failure}")
        return ""

    def restore(self, candidates: Sequence[Record]) -> tuple[Record | None, list[tuple[str, str]]]:
        """Load the first of `candidates` whose bytes are those that were committed.

        Each rank reads and checks what it needs; together that is everything. Returns what was
        loaded, and the damaged checkpoints before it with the reason; they are set aside. Raises
        RunError if the store cannot be read or holds another model.
        """
        began, skipped = time.perf_counter(), []
        for record in candidates:
            damage, failure = self._read(record)
            votes = gather_to_all((damage, failure), self._group)
            if failures := [vote for _, vote in votes if vote]:
                path = f"{self.checkpoints.store.uri}/{record.name}"
                raise RunError(f"cannot load {path}: {failures[0]}")
            if damages := [vote for vote, _ in votes if vote]:
                skipped.append((record.name, damages[0]))
                if self.world.is_main:
                    self.checkpoints.set_aside(record.name, damages[0])
                continue
            self._snapshot.give(self._live())
            self._engine.restored(record.manifest["optimizer_steps"])
            self._ema.updates = record.manifest["ema_updates"]
            self.saved_step = record.step
            self.figures["restore_seconds"] = time.perf_counter() - began
            return record, skipped
        return None, skipped

    def _read(self, record: Record) -> tuple[str, str]:
        """Read into the snapshot; returns what is damaged, and any other failure."""
        store, size = self.checkpoints.store, int(record.manifest["world_size"])
        saved, present = record.manifest["shapes"], self._shapes
        if saved != present:
            name = next(n for n in [*saved, *present] if saved.get(n) != present.get(n))
            shapes = f"{saved.get(name, 'missing')} there and {present.get(name, 'missing')} here"
            return "", f"parameter {name} is {shapes}"
        try:
            self._snapshot.read(store, record.name, size, record.files)
            key = buffers_key(record.name, self.world.rank if self.world.rank < size else 0)
            buffers = safetensors.torch.load(fetch(store, key, record.files[key]))
        except DamagedError as error:
            return str(error).removeprefix(f"{record.name}/"), ""
        except (StoreError, OSError, KeyError) as error:
            return "", str(error)
        self._engine.shards.load_buffers(buffers)
        return "", ""

    def beginning(self, record: Record | None, skipped: list[tuple[str, str]]) -> list[str]:
        """Lines to log before the first step: what was loaded and skipped, and the memory."""
        lines = [f"skipped {name}: {reason}" for name, reason in skipped]
        if record:
            before, now = record.manifest["world_size"], self.world.size
            ranks = f", written by {before} ranks and now on {now}" if before != now else ""
            seconds = self.figures["restore_seconds"]
            lines.append(f"continues from {record.name}{ranks}; loaded in {seconds:.2f} s")
        averages, host = self._ema.nbytes / 2**20, self.nbytes / 2**20
        lines.append(
            f"memory a rank: {averages:.1f} MiB of averaged weights, {host:.1f} MiB of host memory "
            "to save from"
        )
        return lines
