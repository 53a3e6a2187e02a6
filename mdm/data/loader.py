"""Batches of a mixture from any step on: verified, prefetched, the same for every number of ranks.

Reading happens in this process: pre-encoded rows cost less to read than to hand to another one. One
thread makes the batches ahead of their use and reads folders itself; S3 is read by others.
"""

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mdm.config import Config, ModelConfig
from mdm.data import resume
from mdm.data.batch import Batch
from mdm.data.blocklist import substituted
from mdm.data.cache import NodeCache
from mdm.data.collate import Collator, Plan
from mdm.data.mixture import Mixture, open_mixture
from mdm.data.order import Draw, Order, check_world
from mdm.data.reader import RowCache, open_cache, open_readers
from mdm.data.resume import ResumeError as ResumeError
from mdm.storage import StoreError
from mdm.utils.ranks import World


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
        model: ModelConfig | None = None,
    ) -> None:
        """With `model`, batches that do not fit it raise ValueError."""
        self.mixture = mixture
        self.seed = seed
        self.world = world or World()
        check_world(mixture.global_batch, self.world)
        self._order = Order(mixture, seed)
        self._lengths = {"image_text": caption_length, "text": dialogue_length}
        readers = open_readers(mixture, node_cache, cache_bytes)
        self._cache = RowCache(readers, cache_bytes, threads, mixture.window)
        self._collator = Collator(mixture, self._cache, self._lengths, self.world, model)
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

    def plan(self, step: int) -> Plan:
        """What a step reads; the reading begins."""
        return self._collator.ask(substituted(self._order, step, self.quarantined))

    def collate(self, plans: Sequence[Plan]) -> list[Batch]:
        """This rank's batch of each of these steps; StoreError if its data cannot be read."""
        return self._collator.collate(plans)

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
_TOGETHER = 512  # samples: then what is paid by the call is little


class _Producer:
    """A thread that makes the batches of the next steps ahead of their use.

    Those at hand are made together and go over in one piece: waking another thread takes longer
    than making a small batch.
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
        plans: deque[Plan] = deque()
        asked = step
        most = _TOGETHER
        try:
            while turns := self._turns.get():
                while turns and not self._stopping:
                    # Steps ahead are asked for before this one is made: their latency is hidden.
                    while len(plans) <= self._ahead:
                        plans.append(loader.plan(asked))
                        asked += 1
                    some = _at_hand(plans, turns, most)
                    try:
                        batches = loader.collate(some)
                    except StoreError:
                        if len(some) == 1:
                            raise
                        most = 1  # the batches before the one that fails are good
                        continue
                    for _ in some:
                        plans.popleft()
                    draws = [plan.draw for plan in some]
                    self._ready.put(list(zip(draws, batches, strict=True)))
                    turns -= len(some)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._ready.put([error])

    def get(self) -> "_Made":
        if not self._taken:
            self._taken.extend(self._ready.get())
            self._turns.put(len(self._taken))
        return self._taken.popleft()

    def close(self) -> None:
        self._stopping = True
        self._turns.put(0)
        self._thread.join()


def _at_hand(plans: Iterable[Plan], steps: int, samples: int) -> list[Plan]:
    """The first plan, and those after it that need no waiting, within these numbers."""
    found: list[Plan] = []
    for plan in plans:
        samples -= len(plan.share.ids)
        if found and (len(found) == steps or samples < 0 or not plan.is_ready):
            break
        found.append(plan)
    return found


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
        model=model,
    )
