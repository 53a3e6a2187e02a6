"""Record batches of encoded data sets: read by byte range, verified, held in memory."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from mdm.data.manifest import Manifest
from mdm.data.mixture import Source
from mdm.data.schema import Rows, checksum, read_rows
from mdm.data.storage import Store, StoreError

BatchKey = tuple[int, int, int]  # source, shard, record batch


class SourceReader:
    """Reads record batches of one source by byte range and checks every one."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.manifest: Manifest = source.manifest
        self.store: Store = source.manifest.store()

    def runs(self, shard: int, batches: list[int]) -> list[tuple[int, list[int]]]:
        """Adjacent record batches of a shard, to be read by one request each."""
        runs = groupby(enumerate(sorted(batches)), key=lambda at: at[1] - at[0])
        return [(shard, [batch for _, batch in run]) for _, run in runs]

    def read(self, shard: int, run: list[int]) -> list[Rows]:
        """These adjacent record batches; StoreError if one is damaged twice."""
        info = self.manifest.shards[shard]
        first, last = info.batches[run[0]], info.batches[run[-1]]
        end = last.offset + last.length
        data = memoryview(self.store.read_range(info.key, first.offset, end - first.offset))
        found = []
        for number in run:
            batch = info.batches[number]
            part = data[batch.offset - first.offset :][: batch.length]
            if checksum(part) != batch.xxh3:
                part = self._again(shard, number)
            found.append(read_rows(part, self.manifest.schema))
        return found

    def _again(self, shard: int, number: int) -> memoryview:
        """Bytes may be flipped on their way: one more try, then it is the object itself."""
        info = self.manifest.shards[shard]
        batch = info.batches[number]
        data = self.store.read_range(info.key, batch.offset, batch.length)
        if (found := checksum(data)) != batch.xxh3:
            raise StoreError(
                f"source {self.source.name!r}: record batch {number} of {self.store.uri}/{info.key}"
                f" is damaged (bytes {batch.offset} to {batch.offset + batch.length}): xxh3 is "
                f"{found}, the manifest says {batch.xxh3}; run verify.py, then restore the shard"
            )
        return memoryview(data)


class RowCache:
    """Record batches in memory, the least recently used dropped beyond a budget of bytes."""

    def __init__(self, readers: list[SourceReader], budget: int, threads: int) -> None:
        self.readers = readers
        self.budget = budget
        self._held: OrderedDict[BatchKey, Rows] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mdm-read")

    def get(self, wanted: set[BatchKey]) -> dict[BatchKey, Rows]:
        """All of these; what is missing is read at once, adjacent ones by one request."""
        missing = sorted(wanted - self._held.keys())
        runs = [
            (source, shard, run)
            for (source, shard), keys in groupby(missing, key=lambda k: k[:2])
            for _, run in self.readers[source].runs(shard, [k[2] for k in keys])
        ]
        fetched = self._pool.map(lambda at: self.readers[at[0]].read(at[1], at[2]), runs)
        for (source, shard, run), batches in zip(runs, fetched, strict=True):
            for number, rows in zip(run, batches, strict=True):
                self._held[source, shard, number] = rows
                self._bytes += rows.nbytes
        found = {}
        for key in wanted:
            self._held.move_to_end(key)
            found[key] = self._held[key]
        while self._bytes > self.budget and len(self._held) > len(wanted):
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
