"""The long lists of a manifest in parts: immutable objects named by their hash, fetched as needed.

A manifest names its parts; a part holds `PART_SHARDS` shards with the places of their record
batches (about a megabyte for two million samples), or `PART_QUARANTINE` records in quarantine.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from mdm.data.schema import BatchInfo, ShardInfo
from mdm.storage import Store, StoreError, open_store

T = TypeVar("T")
PART_SHARDS = 256
PART_QUARANTINE = 4096
HELD = 32  # parts of one list in memory: those of two pools of the order
_DIGITS = 16  # of a checksum


class ManifestError(ValueError):
    """A manifest that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Quarantined:
    """A record that could not be encoded, why, and where it lies."""

    id: str
    reason: str
    origin: str


class PartInfo(NamedTuple):
    """One part of a list: `parts/<sha256>.json`."""

    sha256: str
    items: int
    rows: int  # examples in its shards; 0 for a part of the quarantine

    @property
    def key(self) -> str:
        """Its object."""
        return f"parts/{self.sha256}.json"


class Places(Sequence[BatchInfo]):
    """Where the record batches of a shard lie, one after the other, made when asked for."""

    def __init__(self, rows: int, batch_rows: int, offsets: NDArray[np.int64], sums: str) -> None:
        self._rows, self._size = rows, batch_rows
        self._offsets = offsets  # one more than batches: the last is the end
        self._sums = sums  # checksums, one after the other

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, at: int) -> BatchInfo: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[BatchInfo, ...]: ...
    def __getitem__(self, at: int | slice) -> BatchInfo | tuple[BatchInfo, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        at = range(len(self))[at]
        offset, end = self._offsets[at : at + 2].tolist()
        return BatchInfo(
            offset,
            end - offset,
            min(self._size, self._rows - at * self._size),
            self._sums[at * _DIGITS : (at + 1) * _DIGITS],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._sums)


class ShardPart(Sequence[ShardInfo]):
    """Successive shards; all their record batches have `batch_rows` rows but a shard's last."""

    def __init__(self, batch_rows: int, shards: list[dict[str, Any]]) -> None:
        self._size, self._shards = batch_rows, shards
        for shard in shards:  # a fifth of a list's memory
            shard["offsets"] = np.array(shard["offsets"], np.int64)
        self.rows: NDArray[np.int64] = np.array([s["rows"] for s in shards], np.int64)

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, at: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[ShardInfo, ...]: ...
    def __getitem__(self, at: int | slice) -> ShardInfo | tuple[ShardInfo, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        s = self._shards[at]
        places = Places(s["rows"], self._size, s["offsets"], s["xxh3"])
        return ShardInfo(s["key"], s["rows"], s["bytes"], s["sha256"], places)

    @staticmethod
    def encode(shards: Sequence[ShardInfo], batch_rows: int) -> bytes:
        """A part of these; ManifestError if their record batches leave gaps or do not add up."""
        for shard in shards:
            _check_shard(shard, batch_rows)
        plain = [
            {
                "key": s.key,
                "rows": s.rows,
                "bytes": s.bytes,
                "sha256": s.sha256,
                "offsets": [b.offset for b in s.batches]
                + [b.offset + b.length for b in s.batches[-1:]],
                "xxh3": "".join(b.xxh3 for b in s.batches),
            }
            for s in shards
        ]
        return canonical({"batch_rows": batch_rows, "shards": plain})

    @classmethod
    def decode(cls, data: bytes) -> "ShardPart":
        """What `encode` wrote."""
        plain = json.loads(data)
        return cls(plain["batch_rows"], plain["shards"])


def _check_shard(shard: ShardInfo, size: int) -> None:
    batches = shard.batches
    if (
        any(b.rows != size for b in batches[:-1])
        or any(b.rows > size for b in batches)
        or (sum(b.rows for b in batches) != shard.rows)
    ):
        raise ManifestError(f"shard {shard.key} is not {shard.rows} rows in batches of {size}")
    for one, two in pairwise(batches):
        if one.offset + one.length != two.offset:
            raise ManifestError(
                f"shard {shard.key}: a record batch ends at byte {one.offset + one.length}, the "
                f"next one begins at {two.offset}"
            )
    if any(len(b.xxh3) != _DIGITS for b in batches):
        raise ManifestError(f"shard {shard.key}: a checksum has not {_DIGITS} digits")


def encode_quarantine(records: Sequence[Quarantined]) -> bytes:
    """A part of these."""
    return canonical([asdict(q) for q in records])


def decode_quarantine(data: bytes) -> tuple[Quarantined, ...]:
    """What `encode_quarantine` wrote."""
    return tuple(Quarantined(**q) for q in json.loads(data))


class StoredParts:
    """The parts of one data set in its store, each checked against its name."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __call__(self, info: PartInfo) -> bytes:
        """The part's bytes; StoreError if they are not what its name says, twice."""
        store = open_store(self.uri)
        for _ in range(2):  # bytes may be flipped on their way
            data = store.get(info.key)
            if (found := hashlib.sha256(data).hexdigest()) == info.sha256:
                return data
        raise StoreError(f"{self.uri}/{info.key} is damaged: its sha256 is {found}")


class PartList(Sequence[T]):
    """A list that lies in parts; those last used stay in memory, at most `HELD`."""

    def __init__(
        self,
        infos: Iterable[PartInfo],
        decode: Callable[[bytes], Sequence[T]],
        fetch: Callable[[PartInfo], bytes],
    ) -> None:
        self.infos = tuple(infos)
        self.fetch = fetch
        self.fetched = 0  # parts, again and again included
        self.item_start = starts([i.items for i in self.infos])  # of each part, and the end
        self.row_start = starts([i.rows for i in self.infos])
        self._decode = decode
        self._held: OrderedDict[int, Sequence[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PartList, (self.infos, self._decode, self.fetch)

    def __len__(self) -> int:
        return int(self.item_start[-1])

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...
    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        at = range(len(self))[at]
        number = int(np.searchsorted(self.item_start, at, side="right")) - 1
        return self.part(number)[at - int(self.item_start[number])]

    def __iter__(self) -> Iterator[T]:
        for number in range(len(self.infos)):
            yield from self.part(number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartList) and self.infos == other.infos

    def __hash__(self) -> int:
        return hash(self.infos)

    def part(self, number: int) -> Sequence[T]:
        """One part, fetched unless it is held."""
        with self._lock:
            if number not in self._held:
                self._held[number] = self._decode(self.fetch(self.infos[number]))
                self.fetched += 1
            self._held.move_to_end(number)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
            return self._held[number]

    def write(self, store: Store) -> None:
        """Put every part that is not there yet into `store`."""
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
    """These shards in parts of `size`, written to `store` as they are full, or kept in memory."""
    return _cut(
        shards, size, lambda s: ShardPart.encode(s, batch_rows), ShardPart.decode, _rows, store
    )


def quarantine_parts(
    records: Iterable[Quarantined], store: Store | None = None, size: int = PART_QUARANTINE
) -> PartList[Quarantined]:
    """These records in parts of `size`, written to `store` as they are full, or kept in memory."""
    return _cut(records, size, encode_quarantine, decode_quarantine, lambda _: 0, store)


def _rows(shards: Sequence[ShardInfo]) -> int:
    return sum(s.rows for s in shards)


def _cut(
    items: Iterable[T],
    size: int,
    encode: Callable[[Sequence[T]], bytes],
    decode: Callable[[bytes], Sequence[T]],
    rows: Callable[[Sequence[T]], int],
    store: Store | None,
) -> PartList[T]:
    held: dict[PartInfo, bytes] = {}
    infos = []
    rest = iter(items)
    while part := list(islice(rest, size)):
        data = encode(part)
        info = PartInfo(hashlib.sha256(data).hexdigest(), len(part), rows(part))
        infos.append(info)
        if store is None:
            held[info] = data
        else:
            store.put(info.key, data, if_absent=True)
    return PartList(infos, decode, held.__getitem__ if store is None else StoredParts(store.uri))


def starts(values: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of some successive spans begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])


def canonical(plain: Any) -> bytes:
    """Sorted, unspaced JSON with a newline."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"
