"""The long lists of a manifest, split into manifest parts: immutable objects named by their hash.

A part is fetched when one of its items is needed. It holds `PART_SHARDS` shards with the byte
ranges of their record batches (about a megabyte for two million samples), or `PART_QUARANTINE`
quarantined records.
"""

import hashlib
import json
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mdm.data.schema import BatchInfo, ShardInfo
from mdm.storage import Store, StoreError, open_store

T = TypeVar("T")
PART_SHARDS = 256
PART_QUARANTINE = 4096
HELD = 32  # parts of one list kept in memory: those of two shuffle pools
_DIGITS = 16  # of a checksum


class ManifestError(ValueError):
    """A manifest that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Quarantined:
    """A record that could not be encoded, why, and where it is."""

    id: str
    reason: str
    origin: str


class PartInfo(NamedTuple):
    """One manifest part: `parts/<sha256>.json`."""

    sha256: str
    items: int
    rows: int  # samples in its shards; 0 for a part of the quarantine

    @property
    def key(self) -> str:
        """Key of its object."""
        return f"parts/{self.sha256}.json"


class LazySequence(Sequence[T]):
    """A sequence that builds an item each time it is read."""

    @abstractmethod
    def item(self, index: int) -> T:
        """The item at `index`, which is within bounds."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(map(self.item, range(len(self))[index]))
        return self.item(range(len(self))[index])


class BatchList(LazySequence[BatchInfo]):
    """The record batches of a shard: to read one, the others need not be built."""

    def __init__(self, shard: dict[str, Any], batch_rows: int) -> None:
        self._shard, self._batch_rows = shard, batch_rows

    def __len__(self) -> int:
        return len(self._shard["offsets"]) - 1

    def item(self, index: int) -> BatchInfo:
        """Where a record batch lies."""
        at, end = self._shard["offsets"][index : index + 2].tolist()
        rows = min(self._batch_rows, self._shard["rows"] - index * self._batch_rows)
        checksum = self._shard["xxh3"][index * _DIGITS : (index + 1) * _DIGITS]
        return BatchInfo(at, end - at, rows, checksum)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)


class ShardPart(LazySequence[ShardInfo]):
    """Consecutive shards. A record batch has `batch_rows` rows, a shard's last one maybe fewer."""

    def __init__(self, batch_rows: int, shards: list[dict[str, Any]]) -> None:
        self._batch_rows, self._shards = batch_rows, shards
        for shard in shards:  # an array takes a fifth of a list's memory
            shard["offsets"] = np.array(shard["offsets"], np.int64)
        self.rows: NDArray[np.int64] = np.array([s["rows"] for s in shards], np.int64)

    def __len__(self) -> int:
        return len(self._shards)

    def item(self, index: int) -> ShardInfo:
        """A shard."""
        s = self._shards[index]
        batches = BatchList(s, self._batch_rows)
        return ShardInfo(s["key"], s["rows"], s["bytes"], s["sha256"], batches)

    @staticmethod
    def encode(shards: Sequence[ShardInfo], batch_rows: int) -> bytes:
        """The bytes of a part; ManifestError if record batches leave gaps or do not add up."""
        plain = []
        for shard in shards:
            _check_shard(shard, batch_rows)
            fields = {name: getattr(shard, name) for name in ("key", "rows", "bytes", "sha256")}
            ends = [b.offset + b.length for b in shard.batches[-1:]]
            fields["offsets"] = [b.offset for b in shard.batches] + ends
            fields["xxh3"] = "".join(b.xxh3 for b in shard.batches)
            plain.append(fields)
        return canonical({"batch_rows": batch_rows, "shards": plain})

    @classmethod
    def decode(cls, data: bytes) -> "ShardPart":
        """The part that `encode` wrote."""
        plain = json.loads(data)
        return cls(plain["batch_rows"], plain["shards"])


def _check_shard(shard: ShardInfo, batch_rows: int) -> None:
    sizes = [b.rows for b in shard.batches]
    if any(n != batch_rows for n in sizes[:-1]) or max(sizes, default=0) > batch_rows:
        raise ManifestError(f"shard {shard.key}: record batches of {sizes}, not {batch_rows} rows")
    if sum(sizes) != shard.rows:
        raise ManifestError(
            f"shard {shard.key}: {shard.rows} rows, its record batches {sum(sizes)}"
        )
    for one, two in pairwise(shard.batches):
        if one.offset + one.length != two.offset:
            raise ManifestError(
                f"shard {shard.key}: a record batch ends at byte {one.offset + one.length}, the "
                f"next one begins at {two.offset}"
            )
    if any(len(b.xxh3) != _DIGITS for b in shard.batches):
        raise ManifestError(f"shard {shard.key}: a checksum does not have {_DIGITS} digits")


def decode_quarantine(data: bytes) -> tuple[Quarantined, ...]:
    """The quarantined records of a manifest part."""
    return tuple(Quarantined(**q) for q in json.loads(data))


@dataclass(frozen=True)
class StoredParts:
    """The manifest parts of one data set in its store, each verified against its name."""

    uri: str

    def __call__(self, info: PartInfo) -> bytes:
        """The part's bytes; StoreError if two reads in a row do not match its sha256."""
        store = open_store(self.uri)
        for _ in range(2):  # bits may flip in transit
            data = store.get(info.key)
            if (sha256 := hashlib.sha256(data).hexdigest()) == info.sha256:
                return data
        raise StoreError(f"{self.uri}/{info.key} is damaged: its sha256 is {sha256}")


class PartList(LazySequence[T]):
    """A list stored in manifest parts; the last `HELD` parts used stay in memory."""

    def __init__(
        self,
        infos: Iterable[PartInfo],
        decode: Callable[[bytes], Sequence[T]],
        fetch: Callable[[PartInfo], bytes],
    ) -> None:
        self.infos = tuple(infos)
        self.fetch = fetch
        self.fetched = 0  # number of fetches, repeated ones included
        self.item_start = starts([i.items for i in self.infos])  # of each part, and the end
        self.row_start = starts([i.rows for i in self.infos])
        self._decode = decode
        self._held: OrderedDict[int, Sequence[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PartList, (self.infos, self._decode, self.fetch)

    def __len__(self) -> int:
        return int(self.item_start[-1])

    def item(self, index: int) -> T:
        """An item; its part is fetched unless it is in memory."""
        number = int(np.searchsorted(self.item_start, index, side="right")) - 1
        return self.part(number)[index - int(self.item_start[number])]

    def __iter__(self) -> Iterator[T]:
        for number in range(len(self.infos)):
            yield from self.part(number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartList) and self.infos == other.infos

    def __hash__(self) -> int:
        return hash(self.infos)

    def part(self, number: int) -> Sequence[T]:
        """One part, fetched unless it is in memory."""
        with self._lock:
            if number not in self._held:
                self._held[number] = self._decode(self.fetch(self.infos[number]))
                self.fetched += 1
            self._held.move_to_end(number)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
            return self._held[number]

    def write(self, store: Store) -> None:
        """Put every part that is missing into `store`."""
        if isinstance(self.fetch, StoredParts) and self.fetch.uri == store.uri:
            return
        for info in self.infos:
            store.put(info.key, self.fetch(info), if_absent=True)


def shard_parts(
    shards: Iterable[ShardInfo],
    batch_rows: int,
    store: Store | None = None,
    size: int = PART_SHARDS,
) -> PartList[ShardInfo]:
    """Splits shards into parts of `size`; each is put into `store` when full, or kept in memory.

    Raises:
        ManifestError: a shard's record batches leave gaps, do not add up or differ in size.
    """
    infos, fetch = _split(shards, size, lambda part: ShardPart.encode(part, batch_rows), store)
    return PartList(infos, ShardPart.decode, fetch)


def quarantine_parts(
    records: Iterable[Quarantined] = (), store: Store | None = None, size: int = PART_QUARANTINE
) -> PartList[Quarantined]:
    """The same for quarantined records."""
    infos, fetch = _split(records, size, lambda part: canonical(list(map(asdict, part))), store)
    return PartList(infos, decode_quarantine, fetch)


def _split(
    items: Iterable[T], size: int, encode: Callable[[list[Any]], bytes], store: Store | None
) -> tuple[list[PartInfo], Callable[[PartInfo], bytes]]:
    """The parts that were written, and how to fetch one."""
    in_memory: dict[PartInfo, bytes] = {}
    infos = []
    rest = iter(items)
    while part := list(islice(rest, size)):
        data = encode(part)
        rows = sum(getattr(item, "rows", 0) for item in part)
        infos.append(info := PartInfo(hashlib.sha256(data).hexdigest(), len(part), rows))
        if store is None:
            in_memory[info] = data
        else:
            store.put(info.key, data, if_absent=True)
    return infos, in_memory.__getitem__ if store is None else StoredParts(store.uri)


def starts(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """i64 [n + 1]: where each of n consecutive ranges begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def canonical(plain: Any) -> bytes:
    """JSON with sorted keys, no spaces and a final newline."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"
