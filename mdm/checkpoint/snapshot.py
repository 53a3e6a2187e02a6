"""One rank's share of the training state in host memory, and how shares travel to a store and back.

A share is one flat fp32 vector a kind: weights, Adam's two moments, averages. `Piece` says which
numbers of which parameter lie where in it, so that what n ranks wrote, m ranks can read: each picks
its own numbers out of all shares.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from mdm.storage import MissingObjectError, Store

PART = 16 << 20  # numbers in one object: 64 MiB, small enough to try again
THREADS = 4  # of one rank towards the store
T = TypeVar("T")
R = TypeVar("R")


class DamagedError(ValueError):
    """Bytes are not those that were committed; the message says which."""


class Piece(NamedTuple):
    """`length` numbers of a flattened parameter from `start` on, at `offset` of a share."""

    name: str
    start: int
    length: int
    offset: int


class Copy(NamedTuple):
    """`length` numbers from `source` of one share to `target` of another."""

    source: int
    target: int
    length: int


def entry_of(data: bytes | memoryview) -> dict[str, Any]:
    """What a manifest says about an object: its size and hash."""
    return {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}


def fetch(store: Store, key: str, entry: Mapping[str, Any]) -> bytes:
    """The object as it was committed; DamagedError if it is not."""
    try:
        data = store.get(key)
    except MissingObjectError:
        raise DamagedError(f"{key} is missing") from None
    if len(data) != entry["bytes"]:
        raise DamagedError(f"{key} has {len(data)} bytes instead of {entry['bytes']}")
    if entry_of(data) != entry:
        raise DamagedError(f"{key} has changed since it was committed")
    return data


def side_by_side(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`call` of each item in a few threads; the first failure ends it."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mdm-checkpoint") as pool:
        running = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in running]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def table_key(folder: str, rank: int) -> str:
    """Where a rank says what its share consists of."""
    return f"{folder}/rank-{rank:05d}.json"


def part_key(folder: str, rank: int, kind: str, number: int) -> str:
    """Where the `number`-th part of a share lies."""
    return f"{folder}/rank-{rank:05d}/{kind}.{number:04d}"


def buffers_key(folder: str, rank: int) -> str:
    """Where a rank's module buffers lie."""
    return f"{folder}/rank-{rank:05d}/buffers"


def overlaps(sources: Sequence[Piece], targets: Sequence[Piece]) -> list[Copy]:
    """What to copy from one share to have all of another's numbers that it holds."""
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in sources:
        by_name[piece.name].append(piece)
    found = []
    for mine in targets:
        for theirs in by_name[mine.name]:
            first = max(mine.start, theirs.start)
            last = min(mine.start + mine.length, theirs.start + theirs.length)
            if first < last:
                at = (theirs.offset + first - theirs.start, mine.offset + first - mine.start)
                found.append(Copy(*at, last - first))
    return found


def within(copies: Sequence[Copy], first: int, last: int) -> list[Copy]:
    """The parts of `copies` whose sources lie in [first, last), sources counted from `first`."""
    cut = []
    for copy in copies:
        a, b = max(copy.source, first), min(copy.source + copy.length, last)
        if a < b:
            cut.append(Copy(a - first, copy.target + a - copy.source, b - a))
    return cut


class Snapshot:
    """Host memory for one share: taken from the device in one go, given back, written and read.

    Args:
        live: the rank's flat fp32 tensors by kind; a share is each kind's tensors end to end.
        pieces: what a share consists of.
    """

    def __init__(self, live: Mapping[str, Sequence[Tensor]], pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        self.length = sum(t.numel() for t in next(iter(live.values())))
        self._on_device = any(t.device.type != "cpu" for ts in live.values() for t in ts)
        # Zeros also have the pages mapped before the first step has to wait for them.
        self.host = {
            kind: torch.zeros(self.length, dtype=torch.float32, pin_memory=self._on_device)
            for kind in live
        }

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return 4 * self.length * len(self.host)

    def take(self, live: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy the live tensors; what was held before is overwritten."""
        for host, flat in self._pairs(live):
            host.copy_(flat, non_blocking=True)
        self._finish()

    def give(self, live: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy into the live tensors."""
        for host, flat in self._pairs(live):
            flat.copy_(host, non_blocking=True)
        self._finish()

    def _pairs(self, live: Mapping[str, Sequence[Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
        for kind, flats in live.items():
            ends = [0]
            for flat in flats:
                ends.append(ends[-1] + flat.numel())
            for (a, b), flat in zip(pairwise(ends), flats, strict=True):
                yield self.host[kind][a:b], flat.detach()

    def _finish(self) -> None:
        if self._on_device:
            torch.cuda.synchronize()

    def write(self, store: Store, folder: str, rank: int) -> dict[str, dict[str, Any]]:
        """Put the share and its table below `folder`; returns size and hash by key."""
        table = {"length": self.length, "kinds": list(self.host), "pieces": self.pieces}
        objects: dict[str, bytes | memoryview] = {
            table_key(folder, rank): json.dumps(table).encode()
        }
        for kind, host in self.host.items():
            view = host.numpy().view(np.uint8).data
            for number, at in enumerate(range(0, len(view), 4 * PART)):
                objects[part_key(folder, rank, kind, number)] = view[at : at + 4 * PART]
        return write_objects(store, objects)

    def read(
        self,
        store: Store,
        folder: str,
        world_size: int,
        files: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Fill this share from those that `world_size` ranks wrote, checking every byte read.

        Raises:
            DamagedError: an object is not what `files` says.
            KeyError: the checkpoint lacks a parameter of this model, or a kind.
        """
        found = 0
        reads: list[tuple[str, str, list[Copy]]] = []
        for rank in range(world_size):
            key = table_key(folder, rank)
            table = json.loads(fetch(store, key, files[key]))
            copies = overlaps([Piece(*p) for p in table["pieces"]], self.pieces)
            found += sum(copy.length for copy in copies)
            for number, at in enumerate(range(0, table["length"], PART)):
                if wanted := within(copies, at, at + PART):
                    keys = {kind: part_key(folder, rank, kind, number) for kind in self.host}
                    reads += [(kind, key, wanted) for kind, key in keys.items()]
        if found != (wanting := sum(piece.length for piece in self.pieces)):
            raise KeyError(f"it holds {found} of the {wanting} numbers of this rank's parameters")

        def read_part(task: tuple[str, str, list[Copy]]) -> None:
            kind, key, copies = task
            data = bytearray(fetch(store, key, files[key]))
            numbers = torch.frombuffer(data, dtype=torch.float32)
            for source, target, length in copies:
                self.host[kind][target : target + length] = numbers[source : source + length]

        for host in self.host.values():
            host.zero_()  # padding is nobody's
        side_by_side(read_part, reads)


def write_objects(
    store: Store, objects: Mapping[str, bytes | memoryview]
) -> dict[str, dict[str, Any]]:
    """Put all of them; returns size and hash by key."""

    def put(item: tuple[str, bytes | memoryview]) -> tuple[str, dict[str, Any]]:
        key, data = item
        store.put(key, data)
        return key, entry_of(data)

    return dict(side_by_side(put, objects.items()))


def read_whole(
    store: Store,
    folder: str,
    world_size: int,
    files: Mapping[str, Mapping[str, Any]],
    kind: str,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Full parameters of one kind by name, with no rank running."""
    pieces, at = [], 0
    for name, shape in shapes.items():
        pieces.append(Piece(name, 0, torch.Size(shape).numel(), at))
        at += pieces[-1].length
    whole = Snapshot({kind: [torch.empty(at)]}, pieces)
    whole.read(store, folder, world_size, files)
    flat = whole.host[kind]
    return {p.name: flat[p.offset : p.offset + p.length].view(*shapes[p.name]) for p in pieces}
