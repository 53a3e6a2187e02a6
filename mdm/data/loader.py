"""Batches of a mixture from any step on: verified, prefetched, the same for every number of ranks.

Reading happens in this process: pre-encoded rows cost less to read than to hand to another one. One
thread makes the batches ahead of their use and reads folders itself; S3 is read by others.

Shapes: B samples of this rank, N image tokens, M text tokens, C numbers a latent.
"""

import hashlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdm.config import Config
from mdm.data import packing, resume
from mdm.data.batch import Batch, sample_keys
from mdm.data.buffers import BUFFERS
from mdm.data.mixture import Mixture, open_mixture
from mdm.data.node_cache import NodeCache
from mdm.data.order import Draw, Order, check_world, layout_of
from mdm.data.quarantine import substituted
from mdm.data.reader import BatchKey, Pending, RowCache, open_cache, open_readers
from mdm.data.resume import ResumeError as ResumeError
from mdm.data.schema import CELL
from mdm.data.tokenizer import PAD
from mdm.dist import World


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
        node_cache: NodeCache | None = None,
    ) -> None:
        self.mixture = mixture
        self.seed = seed
        self.world = world or World()
        check_world(mixture.global_batch, self.world)
        self._order = Order(mixture, seed)
        self._lengths = {"image_text": caption_length, "text": dialogue_length}
        self._layouts = [layout_of(s) for s in mixture.sources]
        readers = open_readers(mixture, node_cache, cache_bytes)
        self._cache = RowCache(readers, cache_bytes, threads, mixture.window)
        self._prefetch = prefetch
        self._producer: _Producer | None = None
        self._began = time.perf_counter()
        self.step = 0  # the next one
        self.order_digest = ""  # of all global sample ids consumed
        self.quarantined: frozenset[str] = frozenset()  # ids that are not shown any more
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
        state = resume.state_dict(self._order, self._lengths["text"], self.step, self.order_digest)
        return state | {"quarantined": sorted(self.quarantined)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ResumeError names what differs, saved and present."""
        resume.check(state, self._order, self._lengths["text"])
        self._stop()
        self.step = int(state["step"])
        self.order_digest = str(state["order_digest"])
        self.quarantined = frozenset(state.get("quarantined", ()))
        self._began, self.first_batch_seconds = time.perf_counter(), None

    def quarantine(self, ids: Iterable[str]) -> None:
        """From the next batch on, others take the places of these samples; every rank must call."""
        self._stop()
        self.quarantined |= frozenset(ids)

    def sample_ids(self, step: int) -> list[str]:
        """The global sample ids of any step, as they stand with what is quarantined now."""
        return substituted(self._order, step, self.quarantined).ids

    def plan(self, step: int) -> "_Plan":
        """What a step reads; the reading begins."""
        draw = substituted(self._order, step, self.quarantined)
        # Which rank has a packed text is decided by the lengths of all: every rank reads them.
        return self._ask(draw, draw if self._packs(draw) else draw.share(self.world))

    def _packs(self, draw: Draw) -> bool:
        return draw.task == "text" and self.mixture.texts_per_row > 1

    def _ask(self, draw: Draw, share: Draw) -> "_Plan":
        size = len(share.ids)
        if len(self._layouts) == 1:
            shards, batches, rows = self._layouts[0].locate(share.rows)
        else:
            shards, batches, rows = (np.empty(size, np.int64) for _ in range(3))
            for source in np.flatnonzero(np.bincount(share.sources)).tolist():
                at = share.sources == source
                shards[at], batches[at], rows[at] = self._layouts[source].locate(share.rows[at])
        columns = share.sources.tolist(), shards.tolist(), batches.tolist()
        keys: list[BatchKey] = list(zip(*columns, strict=True))
        return _Plan(draw, share, keys, rows.tolist(), self._cache.ask(dict.fromkeys(keys)))

    def collate(self, plan: "_Plan") -> Batch:
        """This rank's batch of a step; StoreError if its data cannot be read."""
        share, length = plan.share, self._lengths[plan.share.task]
        held = {key: self._cache.wait(pending) for key, pending in plan.pending.items()}
        flat = {key: rows.cells(length) for key, rows in held.items()}
        cells = _joined(flat, plan, length + CELL).view(np.uint16).reshape(-1, length + CELL)
        tokens = cells[:, :length].astype(np.int64)
        prompts, class_ids = cells[:, length:].copy().view(np.int32).astype(np.int64).T
        if self._packs(plan.draw):
            return self._pack(share, tokens, prompts, class_ids)
        latents = None
        views = {key: rows.latents for key, rows in held.items() if rows.latents is not None}
        if views:
            _, *shape = next(iter(views.values())).shape
            flat = {key: bits.data.cast("B") for key, bits in views.items()}
            bits = _joined(flat, plan, math.prod(shape))
            latents = torch.from_numpy(bits).view(torch.bfloat16).view(-1, *shape)
        return Batch(
            ids=tuple(share.ids),
            keys=sample_keys(share.ids),
            epochs=torch.from_numpy(share.epochs.copy()),
            class_ids=torch.from_numpy(class_ids.copy()),
            tokens=torch.from_numpy(tokens),
            prompt=torch.from_numpy(np.arange(length) < prompts[:, None]),
            latents=latents,
        )

    def _pack(
        self,
        draw: Draw,
        tokens: NDArray[np.int64],
        prompts: NDArray[np.int64],
        class_ids: NDArray[np.int64],
    ) -> Batch:
        """This rank's rows of a step's packed texts, [T, M] as yet."""
        lengths = (tokens != PAD).sum(1).tolist()
        packs = packing.plan(lengths, tokens.shape[1], self.mixture.global_batch)
        own = packing.share(packs, self.world.rank, self.world.size)
        texts = [text[:length] for text, length in zip(tokens, lengths, strict=True)]
        packed = packing.fill(own, texts, prompts.tolist(), tokens.shape[1])
        places = np.array([place for pack in own for place in pack], np.int64)
        mine = draw.take(places)
        return Batch(
            ids=tuple(mine.ids),
            keys=sample_keys(mine.ids),
            epochs=torch.from_numpy(mine.epochs),
            class_ids=torch.from_numpy(class_ids[places]),
            tokens=torch.from_numpy(packed.tokens),
            prompt=torch.from_numpy(packed.prompt),
            latents=None,
            text_of=torch.from_numpy(packed.text_of),
            average_over=len(draw.ids) // self.world.size,
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

    def __exit__(self, *_: object) -> None:
        self.close()


_Made = tuple[Draw, Batch] | BaseException
_TOGETHER_SECONDS = 2e-3  # that a batch may wait for those after it


@dataclass(frozen=True)
class _Plan:
    """A step whose record batches have been asked for."""

    draw: Draw  # of all ranks
    share: Draw
    keys: list[BatchKey]  # B of them: the record batch of each sample
    rows: list[int]  # B of them: its row there
    pending: dict[BatchKey, Pending]

    @property
    def is_ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(pending.run.done() for pending in self.pending.values())


def _joined(views: dict[BatchKey, memoryview], plan: _Plan, numbers: int) -> NDArray[np.uint8]:
    """The rows of a plan, each copied once; `views` are the bytes of u16 [R, numbers]."""
    size = 2 * numbers
    joined = BUFFERS.take(size * len(plan.rows))
    to = joined.data
    at = 0
    for key, row in zip(plan.keys, plan.rows, strict=True):
        to[at : at + size] = views[key][row * size : (row + 1) * size]
        at += size
    return joined


class _Producer:
    """A thread that makes the batches of the next steps ahead of their use.

    What is ready goes over in one piece: waking another thread takes longer than making a small
    batch.
    """

    def __init__(self, loader: Loader, step: int, ahead: int) -> None:
        self._ahead = max(1, ahead)
        # Both are C, and wake their reader without a condition variable.
        self._ready: queue.SimpleQueue[list[_Made]] = queue.SimpleQueue()
        self._turns: queue.SimpleQueue[int] = queue.SimpleQueue()  # batches to be made; 0: stop
        self._taken: deque[_Made] = deque()  # by the reader, not used yet
        self._turns.put(self._ahead)
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(loader, step), name="mdm-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, loader: Loader, step: int) -> None:
        plans: deque[_Plan] = deque()
        while (turns := self._turns.get()) and not self._stopping:
            made: list[_Made] = []
            began = time.perf_counter()
            for left in reversed(range(turns)):
                try:
                    # Steps ahead are asked for before this one is made: their latency is hidden.
                    while len(plans) <= self._ahead:
                        plans.append(loader.plan(step + len(plans)))
                    plan = plans.popleft()
                    made.append((plan.draw, loader.collate(plan)))
                except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                    self._ready.put([*made, error])
                    return
                if self._stopping:
                    return
                step += 1
                now = time.perf_counter()
                if not left or now - began > _TOGETHER_SECONDS or not plans[0].is_ready:
                    self._ready.put(made)
                    made, began = [], now

    def get(self) -> "_Made":
        if not self._taken:
            self._taken.extend(self._ready.get())
            self._turns.put(len(self._taken))
        return self._taken.popleft()

    def close(self) -> None:
        self._stopping = True
        self._turns.put(0)
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
        node_cache=open_cache(mixture, config.data) if config.data.cache_dir else None,
    )
