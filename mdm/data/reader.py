"""Record batches of encoded data sets: read by byte range, verified, held in memory."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mdm.config import DataConfig
from mdm.data.cache import NodeCache
from mdm.data.manifest import Manifest
from mdm.data.mixture import Mixture, Source
from mdm.data.schema import BatchInfo, Rows, checksum
from mdm.storage import LocalStore, Store, StoreError

EXTENT = 8 << 20  # bytes that one request brings into a cache: fewer make S3 slow
_BITS = 24  # of a shard's number, and of a record batch's in it
LOCAL_BYTES = 16 << 20  # of record batches held in memory beside a folder, whose pages are too
REREADS = 3  # of a record batch whose bytes are not those of the manifest


def keys_of(
    sources: NDArray[np.int64], shards: NDArray[np.int64], batches: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The number by which a record batch is known here."""
    keys: NDArray[np.int64] = (sources << _BITS | shards) << _BITS | batches
    return keys


class SourceReader:
    """Reads record batches of one source by byte range and checks every one.

    With a cache, what comes from S3 stays on this node's disk: in extents of adjacent record
    batches if the cache holds the mixture (`whole`), which makes requests few, else one by one.
    A cache's bytes are checked as the network's are. Without one, extents are read from S3 where
    memory holds the mixture (`kept`): then all of an extent is of use.
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
        first = self.manifest.shards[0].batches[0]
        self._per_extent = max(1, EXTENT // first.length) if whole else 1
        kept = kept and self.cache is None and not self.is_local
        self._per_read = max(1, EXTENT // first.length) if kept else 1

    def runs(self, shard: int, batches: list[int]) -> list[tuple[int, list[int]]]:
        """Record batches of a shard, and what else comes, by the request that brings them."""
        if self.cache is not None and not self.cache.is_full:
            extents = groupby(sorted(batches), key=lambda batch: batch // self._per_extent)
            return [(shard, list(run)) for _, run in extents]
        if self._per_read > 1:
            total, size = len(self.shard(shard).batches), self._per_read
            firsts = sorted({batch // size * size for batch in batches})
            return [(shard, list(range(at, min(at + size, total)))) for at in firsts]
        runs = groupby(enumerate(sorted(batches)), key=lambda at: at[1] - at[0])
        return [(shard, [batch for _, batch in run]) for _, run in runs]

    def read(self, shard: int, run: list[int]) -> list[Rows]:
        """The record batches of one of `runs`; StoreError if one stays damaged."""
        return [_sound(rows) for rows in self.read_each(shard, run)]

    def read_each(self, shard: int, run: list[int]) -> list[Rows | StoreError]:
        """The record batches of one of `runs`, or what is wrong with one that stays damaged.

        StoreError if they cannot be read at all.
        """
        info = self.shard(shard)
        if self.cache is not None:
            parts = self._cached(self.cache, shard, run)
        else:
            parts = self._fetch(shard, [info.batches[n] for n in run])
        schema = self.manifest.schema
        return [p if isinstance(p, StoreError) else Rows(p, schema) for p in parts]

    def _cached(self, cache: NodeCache, shard: int, run: list[int]) -> "list[Part]":
        info = self.shard(shard)
        wanted = [info.batches[n] for n in run]
        start = run[0] // self._per_extent * self._per_extent
        extent = info.batches[start : start + self._per_extent]
        if run[-1] >= start + len(extent):  # grouped for a cache that was full
            return self._fetch(shard, wanted)
        first = extent[0].offset
        name = f"{info.sha256}-{first}-{extent[-1].offset + extent[-1].length - first}"
        if (found := self._from_cache(cache, name, first, wanted)) is not None:
            return found
        if cache.is_full:
            return self._fetch(shard, wanted)
        with cache.lock(name):  # of the ranks of this node, one fetches
            if (found := self._from_cache(cache, name, first, wanted)) is not None:
                return found
            parts = self._fetch(shard, list(extent))
            cache.put(name, [_data(part) for part in parts])
        # Copies: a view would hold the whole extent in memory.
        return [bytes(_data(parts[n - start])) for n in run]

    @staticmethod
    def _from_cache(
        cache: NodeCache, name: str, first: int, wanted: list[BatchInfo]
    ) -> "list[Part] | None":
        """The verified bytes; None if they are not there, or damaged, and then dropped."""
        found: list[Part] = []
        for batch in wanted:
            data = cache.read(name, batch.offset - first, batch.length)
            if data is None:
                return None
            if checksum(data) != batch.xxh3:
                cache.drop(name)
                return None
            found.append(data)
        return found

    def _fetch(self, shard: int, batches: list[BatchInfo]) -> "list[Part]":
        """These adjacent record batches by one request, verified, each for itself."""
        info = self.shard(shard)
        first, end = batches[0].offset, batches[-1].offset + batches[-1].length
        data = memoryview(self.store.read_range(info.key, first, end - first))
        parts: list[Part] = []
        for batch in batches:
            part: Part = data[batch.offset - first :][: batch.length]
            if checksum(data[batch.offset - first :][: batch.length]) != batch.xxh3:
                try:
                    part = self._again(shard, batch)
                except StoreError as error:
                    part = error  # of this one alone: who wants its neighbours gets them
            parts.append(part)
        return parts

    def _again(self, shard: int, batch: BatchInfo) -> bytes | memoryview:
        """Bytes may be flipped on their way: a few more tries, then it is the object itself."""
        info = self.shard(shard)
        for _ in range(REREADS):
            data = self.store.read_range(info.key, batch.offset, batch.length)
            if (found := checksum(data)) == batch.xxh3:
                return data
        number = next(n for n, b in enumerate(info.batches) if b.offset == batch.offset)
        raise StoreError(
            f"source {self.source.name!r}: record batch {number} of {self.store.uri}/{info.key}"
            f" is damaged (bytes {batch.offset} to {batch.offset + batch.length}): xxh3 is "
            f"{found}, the manifest says {batch.xxh3}; run verify.py, then restore the shard"
        )


Part = bytes | memoryview | StoreError


def _data(part: Part) -> bytes | memoryview:
    if isinstance(part, StoreError):
        raise part
    return part


def _sound(rows: Rows | StoreError) -> Rows:
    if isinstance(rows, StoreError):
        raise rows
    return rows


class _Inline:
    """A future that is read by who waits for it: for a local file a thread costs more than it."""

    def __init__(self, reader: SourceReader, shard: int, run: list[int]) -> None:
        self._read = (reader, shard, run)
        self._rows: list[Rows | StoreError] | None = None

    def result(self) -> list[Rows | StoreError]:
        """The record batches, read the first time."""
        if self._rows is None:
            reader, shard, run = self._read
            self._rows = reader.read_each(shard, run)
        return self._rows

    def done(self) -> bool:
        """Whether asking takes no waiting."""
        return True


@dataclass(frozen=True)
class Pending:
    """A record batch that is being read."""

    run: "Future[list[Rows | StoreError]] | _Inline"
    place: int  # in the run
    nbytes: int


class RowCache:
    """Record batches in memory, the least recently used dropped beyond a budget of bytes.

    Who has asked for one keeps it: dropping only means that the next one who asks reads it again.
    Of folders alone no more is held than what is in use: the kernel holds their files, and memory
    that is soon used again stays in the processor's caches.
    """

    def __init__(self, readers: list[SourceReader], budget: int, threads: int, window: int) -> None:
        self.readers = readers
        if all(r.is_local for r in readers):
            used = windows_bytes([r.source for r in readers], window)
            budget = min(budget, max(LOCAL_BYTES, 2 * used))
        self.budget = budget
        self._held: OrderedDict[int, Pending] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mdm-read")

    def ask(self, wanted: Collection[int]) -> dict[int, Pending]:
        """All of these keys; what is missing is begun to be read, adjacent ones by one request."""
        missing = sorted(k for k in wanted if k not in self._held)
        for place, keys in groupby(missing, key=lambda k: k >> _BITS):
            source, shard = divmod(place, 1 << _BITS)
            reader = self.readers[source]
            batches = reader.shard(shard).batches
            first = place << _BITS
            for _, run in reader.runs(shard, [k - first for k in keys]):
                read: Future[list[Rows | StoreError]] | _Inline
                if reader.is_local:
                    read = _Inline(reader, shard, run)
                else:
                    read = self._pool.submit(reader.read_each, shard, run)
                for at, number in enumerate(run):
                    pending = Pending(read, at, batches[number].length)
                    if (old := self._held.get(first + number)) is not None:
                        self._bytes -= old.nbytes
                    self._held[first + number] = pending
                    self._bytes += pending.nbytes
        found = {}
        for key in wanted:
            self._held.move_to_end(key)
            found[key] = self._held[key]
        while self._bytes > self.budget and len(self._held) > len(wanted):
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found

    def wait(self, pending: Pending) -> Rows:
        """What was asked for; StoreError if it cannot be read: to ask again is to read again."""
        try:
            return _sound(pending.run.result()[pending.place])
        except BaseException:
            for key in [k for k, held in self._held.items() if held.run is pending.run]:
                self._bytes -= self._held.pop(key).nbytes
            raise

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def open_cache(mixture: Mixture, config: DataConfig) -> NodeCache:
    """The node's cache of a run; ValueError for one that cannot hold what is read at once."""
    limit = round(config.cache_gb * 1e9)
    needed = windows_bytes(mixture.sources, mixture.window)
    if limit < needed:
        raise ValueError(
            f"data.cache_gb is {config.cache_gb:g} ({limit} bytes) but two windows of "
            f"{mixture.window} record batches of each of {len(mixture.sources)} sources take "
            f"{needed} bytes: raise data.cache_gb or lower data.shuffle_window"
        )
    return NodeCache(config.cache_dir, limit)


def windows_bytes(sources: Sequence[Source], window: int) -> int:
    """Of a window in use and one on its way, of each source."""
    return sum(2 * window * s.manifest.shards[0].batches[0].length for s in sources)


def open_readers(mixture: Mixture, cache: NodeCache | None, memory: int = 0) -> list[SourceReader]:
    """A reader for each source of a mixture, beside a `RowCache` of `memory` bytes."""
    size = sum(map(_bytes, mixture.sources))
    whole = cache is not None and size <= cache.limit * 0.9
    kept = size <= memory * 0.9
    return [SourceReader(s, cache, whole=whole, kept=kept) for s in mixture.sources]


def _bytes(source: Source) -> float:
    """About how many there are, told from the first shard: there may be millions of them."""
    first = source.manifest.shards[0]
    return source.manifest.rows * first.bytes / first.rows
