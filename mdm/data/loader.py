"""Batches of a mixture from any step on: verified, prefetched, the same for every number of ranks.

Reading happens in this process, in threads: Arrow, numpy, hashing and sockets leave the
interpreter lock, and pre-encoded rows cost less to read than to hand to another process.

Shapes: B samples of this rank, N image tokens, M text tokens, C numbers a latent.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch

from mdm.config import Config
from mdm.data.batch import Batch, sample_key
from mdm.data.mixture import Mixture, open_mixture
from mdm.data.order import Draw, Order, check_world, layout_of
from mdm.data.reader import BatchKey, RowCache, SourceReader
from mdm.data.schema import from_bfloat16_bits
from mdm.data.text import fit
from mdm.data.tokenizer import PAD
from mdm.dist import World

STATE_VERSION = 1


class ResumeError(ValueError):
    """A saved state belongs to other data; the message names both values."""


class Loader:
    """Iterates over this rank's `Batch` of step after step, endlessly.

    `state_dict()` is JSON and the same on every rank; with it, any number of ranks that divides
    the global batch goes on exactly where these stopped.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int,
        world: World | None = None,
        *,
        caption_length: int,
        dialogue_length: int,
        prefetch: int = 8,
        cache_bytes: int = 512 << 20,
        threads: int = 4,
    ) -> None:
        self.mixture = mixture
        self.seed = seed
        self.world = world or World()
        check_world(mixture.global_batch, self.world)
        self._order = Order(mixture, seed)
        self._lengths = {"image_text": caption_length, "text": dialogue_length}
        self._layouts = [layout_of(s) for s in mixture.sources]
        self._cache = RowCache([SourceReader(s) for s in mixture.sources], cache_bytes, threads)
        self._prefetch = prefetch
        self._producer: _Producer | None = None
        self._began = time.perf_counter()
        self.step = 0  # the next one
        self.order_digest = ""  # of all global sample ids consumed
        self.wait_seconds = 0.0  # in total, that the caller waited for batches
        self.first_batch_seconds: float | None = None  # from construction or restored state

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._producer is None:
            self._producer = _Producer(self, self.step, self._prefetch)
        made = self._producer.get()
        if isinstance(made, BaseException):
            self._stop()
            raise made
        draw, batch = made
        self.order_digest = extend_digest(self.order_digest, draw.ids)
        self.step += 1
        now = time.perf_counter()
        self.wait_seconds += now - began
        if self.first_batch_seconds is None:
            self.first_batch_seconds = now - self._began
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed of what, as JSON."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "order_digest": self.order_digest,
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "global_batch": self.mixture.global_batch,
            "window": self.mixture.window,
            "manifests": {s.name: s.manifest.sha256 for s in self.mixture.sources},
            "weights": {s.name: s.weight for s in self.mixture.sources},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ResumeError names what differs, saved and present."""
        present = {"version": STATE_VERSION, **self._identity()}
        for key, value in present.items():
            if state.get(key) != value:
                raise ResumeError(
                    f"cannot resume: the checkpoint was made with data {key} {state.get(key)}, "
                    f"this run has {value}"
                )
        self._stop()
        self.step = int(state["step"])
        self.order_digest = str(state["order_digest"])
        self._began, self.first_batch_seconds = time.perf_counter(), None

    def make(self, step: int) -> tuple[Draw, Batch]:
        """The global draw of a step and this rank's batch of it."""
        draw = self._order.draw(step)
        return draw, self._collate(draw.share(self.world))

    def _collate(self, draw: Draw) -> Batch:
        size, length = len(draw.ids), self._lengths[draw.task]
        keys: list[BatchKey] = [(0, 0, 0)] * size
        rows = np.empty(size, np.int64)
        for source in np.unique(draw.sources):
            at = np.flatnonzero(draw.sources == source)
            shards, batches, rows[at] = self._layouts[source].locate(draw.rows[at])
            for i, shard, batch in zip(at.tolist(), shards.tolist(), batches.tolist(), strict=True):
                keys[i] = (int(source), shard, batch)
        held = self._cache.get(set(keys))
        tokens = np.full((size, length), PAD, np.int64)
        prompts = np.zeros((size, 1), np.int64)
        class_ids = np.empty(size, np.int64)
        latents: list[np.ndarray[Any, np.dtype[np.uint16]]] = []
        for i, (key, row) in enumerate(zip(keys, rows.tolist(), strict=True)):
            batch_rows = held[key]
            text, prompts[i] = fit(
                batch_rows.text(row), int(batch_rows.prompt_lengths[row]), length
            )
            tokens[i, : len(text)] = text
            class_ids[i] = batch_rows.class_ids[row]
            if batch_rows.latents is not None:
                latents.append(batch_rows.latents[row])
        return Batch(
            ids=tuple(draw.ids),
            keys=torch.tensor([sample_key(i) for i in draw.ids], dtype=torch.int64),
            epochs=torch.from_numpy(draw.epochs.copy()),
            class_ids=torch.from_numpy(class_ids),
            tokens=torch.from_numpy(tokens),
            prompt=torch.from_numpy(np.arange(length) < prompts),
            latents=torch.from_numpy(from_bfloat16_bits(np.stack(latents))) if latents else None,
        )

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def close(self) -> None:
        """End the threads."""
        self._stop()
        self._cache.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Producer:
    """A thread that makes the batches of the next steps ahead of their use."""

    def __init__(self, loader: Loader, step: int, ahead: int) -> None:
        self._ready: queue.Queue[tuple[Draw, Batch] | BaseException] = queue.Queue(max(1, ahead))
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(loader, step), name="mdm-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, loader: Loader, step: int) -> None:
        while not self._closed.is_set():
            try:
                made: tuple[Draw, Batch] | BaseException = loader.make(step)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                made = error
            while not self._closed.is_set():
                try:
                    self._ready.put(made, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return
            step += 1

    def get(self) -> tuple[Draw, Batch] | BaseException:
        return self._ready.get()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def extend_digest(digest: str, ids: list[str]) -> str:
    """The rolling hash of consumed sample ids, one global batch further."""
    return hashlib.blake2b(f"{digest}\n{' '.join(ids)}".encode(), digest_size=16).hexdigest()


def build_loader(config: Config, world: World) -> Loader:
    """The loader of a run; ValueError or StoreError if its data is missing or fits no such model.

    The encoded data sets are those of `config.data.sources` below `config.data.root`.
    """
    mixture = open_mixture(config.data)
    model = config.model
    grid = (model.image_height, model.image_width)
    for source in mixture.sources:
        manifest = source.manifest
        pairs: list[tuple[str, Any, Any]] = [
            ("vocab_size", manifest.vocab_size, model.vocab_size),
        ]
        if manifest.image_grid is not None:
            pairs.append(("latent_dim", manifest.latent_dim, model.latent_dim))
            pairs.append(("image_height x image_width", manifest.image_grid, grid))
        for name, encoded, wanted in pairs:
            if encoded != wanted:
                raise ValueError(
                    f"source {source.name!r} was encoded with {name} {encoded}, model.{name} is "
                    f"{wanted}"
                )
        if len(manifest.class_names) > model.n_classes:
            raise ValueError(
                f"source {source.name!r} has {len(manifest.class_names)} classes, "
                f"model.n_classes is {model.n_classes}"
            )
    return Loader(
        mixture,
        config.seed,
        world,
        caption_length=config.data.caption_length,
        dialogue_length=config.data.dialogue_length,
    )
