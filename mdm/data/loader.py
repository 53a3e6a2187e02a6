"""Batches of a mixture from any step on: verified, prefetched, the same for every number of ranks.

Reading happens in this process, because reading encoded samples costs less than handing them over
from another process. One thread prepares batches ahead of their use and reads folders itself;
other threads read S3.
"""

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from mdm.config import Config, ModelConfig
from mdm.data import resume
from mdm.data.batch import Batch
from mdm.data.blocklist import substituted
from mdm.data.cache import NodeCache
from mdm.data.collate import Collator, Plan
from mdm.data.mixture import Mixture, open_mixture
from mdm.data.order import Draw, SampleOrder, check_world
from mdm.data.reader import RecordBatchCache, open_cache, open_readers
from mdm.storage import StoreError
from mdm.utils.ranks import World

_TOGETHER = 512  # samples collated together: enough to amortise the cost of each call


class Loader:
    """Iterates over this rank's `Batch` of step after step, endlessly.

    `state_dict()` is JSON and the same on every rank; any number of ranks that divides the global
    batch continues from it exactly where these ranks stopped.

    Args:
        mixture: the data sets.
        seed: of the sample order.
        world: this rank and the number of ranks.
        caption_length: text tokens of a sample with images, or of a row of one packed sample.
        dialogue_length: text tokens of a row of text alone.
        prefetch: batches prepared ahead.
        cache_bytes: record batches held in memory.
        threads: that read S3.
        node_cache: where record batches from S3 are kept on this node's disk.
        model: what every batch must fit; None skips this validation.
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
        self.mixture = mixture
        self.seed = seed
        self.world = world or World()
        check_world(mixture.global_batch, self.world)
        self._order = SampleOrder(mixture, seed)
        self._lengths = {"image_text": caption_length, "text": dialogue_length}
        readers = open_readers(mixture, node_cache, cache_bytes)
        self._cache = RecordBatchCache(readers, cache_bytes, threads, mixture.shuffle_window)
        self.collator = Collator(mixture, self._cache, self._lengths, self.world, model)
        self._prefetch = prefetch
        self._producer: _Producer | None = None
        self.step = 0  # the next one
        self.order_digest = ""  # of all global sample ids consumed
        self.blocklist: frozenset[str] = frozenset()  # ids of samples that are not used any more
        self.wait_seconds = 0.0  # total time that the caller waited for batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._producer is None:
            self._producer = _Producer(self, self.step, self._prefetch)
        prepared = self._producer.get()
        if isinstance(prepared, BaseException):
            self._stop()
            raise prepared
        draw, batch = prepared
        self.order_digest = extend_digest(self.order_digest, draw.ids)
        self.step += 1
        self.wait_seconds += time.perf_counter() - began
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed of which data, as JSON."""
        state = resume.state_dict(self._order, self._lengths, self.step, self.order_digest)
        return state | {"quarantined": sorted(self.blocklist)}  # the key of earlier versions

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state; ResumeError names what differs, saved and present."""
        resume.check(state, self._order, self._lengths)
        self._stop()
        self.step = int(state["step"])
        self.order_digest = str(state["order_digest"])
        self.blocklist = frozenset(state.get("quarantined", ()))

    def block(self, ids: Iterable[str]) -> None:
        """Replaces these samples by others from the next batch on; every rank must call it."""
        self._stop()
        self.blocklist |= frozenset(ids)

    def sample_ids(self, step: int) -> list[str]:
        """The global sample ids of any step under the present blocklist."""
        return substituted(self._order, step, self.blocklist).ids

    def plan(self, step: int) -> Plan:
        """What a step reads; starts reading it."""
        return self.collator.request(substituted(self._order, step, self.blocklist))

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def close(self) -> None:
        """Ends the threads."""
        self._stop()
        self._cache.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_Prepared = tuple[Draw, Batch] | BaseException


class _Producer:
    """A thread that prepares the batches of the next steps.

    Batches whose data has arrived are collated together and handed over in one message: waking
    another thread takes longer than collating a small batch.
    """

    def __init__(self, loader: Loader, step: int, ahead: int) -> None:
        self._ahead = max(1, ahead)
        # Simple queues are implemented in C and need no condition variable to wake their reader.
        self._ready: queue.SimpleQueue[list[_Prepared]] = queue.SimpleQueue()
        self._turns: queue.SimpleQueue[int] = queue.SimpleQueue()  # batches to prepare; 0: stop
        self._taken: deque[_Prepared] = deque()  # out of the queue, but not used yet
        self._turns.put(self._ahead)
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(loader, step), name="mdm-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, loader: Loader, step: int) -> None:
        plans: deque[Plan] = deque()
        requested = step
        most = _TOGETHER
        try:
            while turns := self._turns.get():
                while turns and not self._stopping:
                    # Steps ahead are requested before this one is collated, to hide their latency.
                    while len(plans) <= self._ahead:
                        plans.append(loader.plan(requested))
                        requested += 1
                    ready = _ready(plans, turns, most)
                    try:
                        batches = loader.collator.collate(ready)
                    except StoreError:
                        if len(ready) == 1:
                            raise
                        most = 1  # the batches before the failing one are good
                        continue
                    draws = [plans.popleft().draw for _ in ready]
                    self._ready.put(list(zip(draws, batches, strict=True)))
                    turns -= len(ready)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._ready.put([error])

    def get(self) -> "_Prepared":
        if not self._taken:
            self._taken.extend(self._ready.get())
            self._turns.put(len(self._taken))
        return self._taken.popleft()

    def close(self) -> None:
        self._stopping = True
        self._turns.put(0)
        self._thread.join()


def _ready(plans: Iterable[Plan], steps: int, samples: int) -> list[Plan]:
    """The first plan and those after it that need no waiting, up to so many steps and samples."""
    ready: list[Plan] = []
    for plan in plans:
        samples -= len(plan.share.ids)
        if ready and (len(ready) == steps or samples < 0 or not plan.is_ready):
            break
        ready.append(plan)
    return ready


def extend_digest(digest: str, ids: list[str]) -> str:
    """The rolling hash of consumed sample ids, extended by one global batch."""
    return hashlib.blake2b(f"{digest}\n{' '.join(ids)}".encode(), digest_size=16).hexdigest()


def build_loader(config: Config, world: World) -> Loader:
    """The loader of a run. Its data sets are those of `config.data.sources` in `config.data.root`.

    Raises:
        ManifestError, StoreError: a data set is missing or damaged.
        ValueError: a data set does not fit the model; the message names both values.
    """
    mixture = open_mixture(config.data)
    model = config.model
    for source in mixture.sources:
        manifest = source.manifest
        pairs: list[tuple[str, Any, Any]] = [("vocab_size", manifest.vocab_size, model.vocab_size)]
        if manifest.image_grid is not None:
            grid = (model.image_height, model.image_width)
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
