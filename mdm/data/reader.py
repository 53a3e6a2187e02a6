"""Record batches of encoded data sets: read by byte range, verified, held in memory."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mdm.config import DataConfig
from mdm.data.cache import NodeCache
from mdm.data.manifest import Manifest
from mdm.data.mixture import Mixture, Source
from mdm.data.schema import BatchInfo, RecordBatch, checksum
from mdm.storage import LocalStore, Store, StoreError

Data = bytes | memoryview | StoreError  # a record batch's bytes, or why there are none

REQUEST_BYTES = 8 << 20  # that a request brings into a cache: smaller requests make S3 slow
_BITS = 24  # of a shard's number, and of a record batch's number in it
LOCAL_BYTES = 16 << 20  # of record batches of a folder held in memory: the page cache has them too
REREADS = 3  # of a record batch whose bytes do not match the manifest


def keys_of(
    sources: NDArray[np.int64], shards: NDArray[np.int64], batches: NDArray[np.int64]
) -> NDArray[np.int64]:
    """i64: one number that identifies each record batch in a run."""
    keys: NDArray[np.int64] = (sources << _BITS | shards) << _BITS | batches
    return keys


class SourceReader:
    """Reads record batches of one source by byte range and verifies each of them.

    Args:
        source: the data set.
        cache: keeps what comes from S3 on this node's disk; it is verified like network data.
        whole: the cache holds the whole mixture. Then a request brings a cache file of about
            REQUEST_BYTES adjacent record batches, otherwise one record batch.
        kept: without a cache, memory holds the whole mixture. Then a request brings about
            REQUEST_BYTES too, because all of it will be used.
    """

    def __init__(
        self,
        source: Source,
        cache: NodeCache | None = None,
        *,
        whole: bool = False,
        kept: bool = False,
    ) -> None:
        self.source = source
        self.manifest: Manifest = source.manifest
        self.shard = lru_cache(maxsize=64)(self.manifest.shards.__getitem__)
        self.store: Store = source.manifest.store()
        self.is_local = isinstance(self.store, LocalStore)
        self.cache = None if self.is_local else cache
        batches = max(1, REQUEST_BYTES // self.manifest.shards[0].batches[0].length)
        self._per_file = batches if whole else 1
        self._per_read = batches if kept and not self.is_local and self.cache is None else 1

    def runs(self, shard: int, batches: list[int]) -> list[list[int]]:
        """Groups record batches of a shard by the request that brings them.

        A request may bring more record batches than these.
        """
        if self.cache is not None and not self.cache.is_full:
            files = groupby(sorted(batches), key=lambda batch: batch // self._per_file)
            return [list(run) for _, run in files]
        if self._per_read > 1:
            total, size = len(self.shard(shard).batches), self._per_read
            firsts = sorted({batch // size * size for batch in batches})
            return [list(range(at, min(at + size, total))) for at in firsts]
        adjacent = groupby(enumerate(sorted(batches)), key=lambda at: at[1] - at[0])
        return [[batch for _, batch in run] for _, run in adjacent]

    def read(self, shard: int, run: list[int]) -> list[RecordBatch]:
        """The record batches of one of `runs`; StoreError if one stays damaged."""
        return [_raised(batch) for batch in self.read_each(shard, run)]

    def read_each(self, shard: int, run: list[int]) -> list[RecordBatch | StoreError]:
        """The record batches of one of `runs`, or an error for each that stays damaged.

        Raises:
            StoreError: they cannot be read at all.
        """
        if self.cache is not None:
            parts = self._cached(self.cache, shard, run)
        else:
            parts = self._fetch(shard, [self.shard(shard).batches[n] for n in run])
        schema = self.manifest.schema
        return [p if isinstance(p, StoreError) else RecordBatch(p, schema) for p in parts]

    def _cached(self, cache: NodeCache, shard: int, run: list[int]) -> list[Data]:
        info = self.shard(shard)
        wanted = [info.batches[n] for n in run]
        start = run[0] // self._per_file * self._per_file
        file = info.batches[start : start + self._per_file]
        if run[-1] >= start + len(file):  # grouped for a cache that was full
            return self._fetch(shard, wanted)
        first = file[0].offset
        name = f"{info.sha256}-{first}-{file[-1].offset + file[-1].length - first}"
        if (parts := _from_cache(cache, name, first, wanted)) is not None:
            return parts
        if cache.is_full:
            return self._fetch(shard, wanted)
        with cache.lock(name):  # one rank of this node fetches it
            if (parts := _from_cache(cache, name, first, wanted)) is not None:
                return parts
            fetched: list[bytes | memoryview] = []
            for part in self._fetch(shard, list(file)):
                if isinstance(part, StoreError):
                    raise part
                fetched.append(part)
            cache.put(name, fetched)
        # Copies: a view would keep the whole file in memory.
        return [bytes(fetched[n - start]) for n in run]

    def _fetch(self, shard: int, batches: list[BatchInfo]) -> list[Data]:
        """Adjacent record batches by one request, each verified on its own."""
        first, end = batches[0].offset, batches[-1].offset + batches[-1].length
        data = memoryview(self.store.read_range(self.shard(shard).key, first, end - first))
        parts: list[Data] = []
        for batch in batches:
            part = data[batch.offset - first :][: batch.length]
            try:
                good = checksum(part) == batch.xxh3
                parts.append(part if good else self._reread(shard, batch))
            except StoreError as error:
                parts.append(error)  # concerns this one alone: its neighbours are good
        return parts

    def _reread(self, shard: int, batch: BatchInfo) -> bytes | memoryview:
        """Bits may flip in transit: if a few more reads fail too, the object itself is damaged."""
        info = self.shard(shard)
        for _ in range(REREADS):
            data = self.store.read_range(info.key, batch.offset, batch.length)
            if (xxh3 := checksum(data)) == batch.xxh3:
                return data
        number = next(n for n, b in enumerate(info.batches) if b.offset == batch.offset)
        raise StoreError(
            f"source {self.source.name!r}: record batch {number} of {self.store.uri}/{info.key}"
            f" is damaged (bytes {batch.offset} to {batch.offset + batch.length}): xxh3 is "
            f"{xxh3}, the manifest says {batch.xxh3}; run verify.py, then restore the shard"
        )


def _from_cache(
    cache: NodeCache, name: str, first: int, wanted: list[BatchInfo]
) -> list[Data] | None:
    """Verified bytes from a cache file that begins at `first`; None if missing or damaged.

    A damaged file is dropped.
    """
    parts: list[Data] = []
    for batch in wanted:
        data = cache.read(name, batch.offset - first, batch.length)
        if data is None:
            return None
        if checksum(data) != batch.xxh3:
            cache.drop(name)
            return None
        parts.append(data)
    return parts


def _raised(batch: RecordBatch | StoreError) -> RecordBatch:
    if isinstance(batch, StoreError):
        raise batch
    return batch


@dataclass(frozen=True)
class Pending:
    """A record batch that is being read, one of a run of them."""

    run: Callable[[], list[RecordBatch | StoreError]]  # waits for the whole run
    done: Callable[[], bool]  # whether it can be had without waiting for another thread
    place: int  # in the run
    nbytes: int


class RecordBatchCache:
    """Record batches in memory; the least recently used are dropped beyond a budget of bytes.

    A caller keeps what it has requested: after a drop, only the next request reads it again. Of
    folders alone it holds no more than what is in use: the kernel caches their files, and memory
    that is soon reused stays in the processor's caches.
    """

    def __init__(self, readers: list[SourceReader], budget: int, threads: int, window: int) -> None:
        self.readers = readers
        if all(r.is_local for r in readers):
            in_use = shuffle_windows_bytes([r.source for r in readers], window)
            budget = min(budget, max(LOCAL_BYTES, 2 * in_use))
        self.budget = budget
        self._held: OrderedDict[int, Pending] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mdm-read")

    def request(self, wanted: Collection[int]) -> dict[int, Pending]:
        """Starts reading the keys that are not held, adjacent ones by one request.

        Returns all of them.
        """
        missing = sorted(k for k in wanted if k not in self._held)
        for place, keys in groupby(missing, key=lambda k: k >> _BITS):
            source, shard = divmod(place, 1 << _BITS)
            reader, first = self.readers[source], place << _BITS
            batches = reader.shard(shard).batches
            for run in reader.runs(shard, [k - first for k in keys]):
                read: Callable[[], list[RecordBatch | StoreError]]
                done: Callable[[], bool]
                if reader.is_local:  # the first waiter reads: a thread costs more than the read
                    read, done = cache(partial(reader.read_each, shard, run)), lambda: True
                else:
                    future = self._pool.submit(reader.read_each, shard, run)
                    read, done = future.result, future.done
                for at, number in enumerate(run):
                    self._drop(first + number)
                    self._held[first + number] = Pending(read, done, at, batches[number].length)
                    self._bytes += batches[number].length
        requested = {}
        for key in wanted:
            self._held.move_to_end(key)
            requested[key] = self._held[key]
        while self._bytes > self.budget and len(self._held) > len(wanted):
            self._drop(next(iter(self._held)))
        return requested

    def _drop(self, key: int) -> None:
        if (pending := self._held.pop(key, None)) is not None:
            self._bytes -= pending.nbytes

    def wait(self, pending: Pending) -> RecordBatch:
        """The requested record batch; StoreError if it cannot be read.

        After an error, the next request reads it again.
        """
        try:
            return _raised(pending.run()[pending.place])
        except BaseException:
            for key in [k for k, held in self._held.items() if held.run is pending.run]:
                self._drop(key)
            raise

    def close(self) -> None:
        """Ends the reading threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def open_cache(mixture: Mixture, config: DataConfig) -> NodeCache:
    """The node's cache of a run; ValueError if it cannot hold what is read at once."""
    limit = round(config.cache_gb * 1e9)
    needed = shuffle_windows_bytes(mixture.sources, mixture.shuffle_window)
    if limit < needed:
        raise ValueError(
            f"data.cache_gb is {config.cache_gb:g} ({limit} bytes) but two shuffle windows of "
            f"{mixture.shuffle_window} record batches of each of {len(mixture.sources)} sources "
            f"take {needed} bytes: raise data.cache_gb or lower data.shuffle_window"
        )
    return NodeCache(config.cache_dir, limit)


def shuffle_windows_bytes(sources: Sequence[Source], window: int) -> int:
    """Bytes of two shuffle windows of each source: one in use and one that is being read."""
    return sum(2 * window * s.manifest.shards[0].batches[0].length for s in sources)


def open_readers(mixture: Mixture, cache: NodeCache | None, memory: int = 0) -> list[SourceReader]:
    """A reader for each source of a mixture, for a `RecordBatchCache` of `memory` bytes."""
    # Estimated from the first shards: there may be millions of them.
    first = [(s.manifest.rows, s.manifest.shards[0]) for s in mixture.sources]
    size = sum(rows * shard.bytes / shard.rows for rows, shard in first)
    whole = cache is not None and size <= cache.limit * 0.9
    kept = size <= memory * 0.9
    return [SourceReader(s, cache, whole=whole, kept=kept) for s in mixture.sources]
