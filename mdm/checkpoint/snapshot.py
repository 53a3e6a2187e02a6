"""One rank's share of the training state in host memory, written to a store and read back.

A share has one flat fp32 vector for each kind: weights, Adam's two moments, averages. A `Piece`
says which numbers of which parameter lie where in it, so that m ranks can read what n ranks wrote:
each picks its own numbers out of all shares.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from mdm.storage import MissingObjectError, Store

PART = 16 << 20  # numbers in one object: 64 MiB, small enough to retry
THREADS = 4  # transfers of one rank at a time
Files = Mapping[str, Mapping[str, Any]]  # size and hash of each object, by key
T = TypeVar("T")
R = TypeVar("R")


class DamagedError(ValueError):
    """Bytes differ from the committed ones; the message says which."""


class Piece(NamedTuple):
    """`length` numbers of a flattened parameter, from its `start` on, at `offset` of a share."""

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
    """The size and hash of an object, as manifests hold them."""
    return {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}


def fetch(store: Store, key: str, entry: Mapping[str, Any]) -> bytes:
    """The object at `key`; raises DamagedError unless it is the committed one."""
    try:
        data = store.get(key)
    except MissingObjectError:
        raise DamagedError(f"{key} is missing") from None
    if len(data) != entry["bytes"]:
        raise DamagedError(f"{key} has {len(data)} bytes instead of {entry['bytes']}")
    if entry_of(data) != entry:
        raise DamagedError(f"{key} has changed since it was committed")
    return data


def in_threads(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of `call` for all items, a few at a time; raises the first error."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mdm-checkpoint") as pool:
        return list(pool.map(call, items))


def buffers_key(folder: str, rank: int) -> str:
    """The key of a rank's module buffers."""
    return f"{folder}/rank-{rank:05d}/buffers"


def overlaps(sources: Sequence[Piece], targets: Sequence[Piece]) -> list[Copy]:
    """The copies that bring all numbers that two shares have in common from one to the other."""
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in sources:
        by_name[piece.name].append(piece)
    copies = []
    for target in targets:
        for source in by_name[target.name]:
            first = max(target.start, source.start)
            last = min(target.start + target.length, source.start + source.length)
            if first < last:
                at = source.offset + first - source.start
                copies.append(Copy(at, target.offset + first - target.start, last - first))
    return copies


def within(copies: Sequence[Copy], first: int, last: int) -> list[Copy]:
    """The parts of `copies` with sources in [first, last), which then count from `first`."""
    cut = []
    for copy in copies:
        a, b = max(copy.source, first), min(copy.source + copy.length, last)
        if a < b:
            cut.append(Copy(a - first, copy.target + a - copy.source, b - a))
    return cut


class Snapshot:
    """One share in host memory: copied from the device and back, written to a store and read.

    Args:
        live: the rank's flat fp32 tensors by kind; the share holds each kind's end to end.
        pieces: what the share consists of.
    """

    def __init__(self, live: Mapping[str, Sequence[Tensor]], pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        self.length = sum(t.numel() for t in next(iter(live.values())))
        self._on_device = any(t.device.type != "cpu" for ts in live.values() for t in ts)
        # Writing zeros maps the pages now, so that no step has to wait for it.
        self.host = {
            kind: torch.zeros(self.length, dtype=torch.float32, pin_memory=self._on_device)
            for kind in live
        }

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return 4 * self.length * len(self.host)

    def take(self, live: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy the live tensors into the snapshot."""
        for host, flat in self._pairs(live):
            host.copy_(flat, non_blocking=True)
        self._synchronize()

    def give(self, live: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy the snapshot into the live tensors."""
        for host, flat in self._pairs(live):
            flat.copy_(host, non_blocking=True)
        self._synchronize()

    def _pairs(self, live: Mapping[str, Sequence[Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
        for kind, flats in live.items():
            parts = self.host[kind].split([flat.numel() for flat in flats])
            yield from zip(parts, (flat.detach() for flat in flats), strict=True)

    def _synchronize(self) -> None:
        if self._on_device:
            torch.cuda.synchronize()

    def write(self, store: Store, folder: str, rank: int) -> dict[str, dict[str, Any]]:
        """Write the share and its table below `folder`; returns size and hash by key."""
        table = {"length": self.length, "kinds": list(self.host), "pieces": self.pieces}
        share = f"{folder}/rank-{rank:05d}"
        objects: dict[str, bytes | memoryview] = {f"{share}.json": json.dumps(table).encode()}
        for kind, host in self.host.items():
            view = host.numpy().view(np.uint8).data
            for number, at in enumerate(range(0, len(view), 4 * PART)):
                objects[f"{share}/{kind}.{number:04d}"] = view[at : at + 4 * PART]
        return write_objects(store, objects)

    def read(self, store: Store, folder: str, world_size: int, files: Files) -> None:
        """Fill this share from those that `world_size` ranks wrote, checking every byte.

        Raises:
            DamagedError: an object is not what `files` says.
            KeyError: the checkpoint lacks a parameter of this model, or a kind.
        """
        count = 0
        reads: list[tuple[str, str, list[Copy]]] = []
        for rank in range(world_size):
            share = f"{folder}/rank-{rank:05d}"
            key = f"{share}.json"
            table = json.loads(fetch(store, key, files[key]))
            copies = overlaps([Piece(*p) for p in table["pieces"]], self.pieces)
            count += sum(copy.length for copy in copies)
            for number, at in enumerate(range(0, table["length"], PART)):
                if inside := within(copies, at, at + PART):
                    reads += [(kind, f"{share}/{kind}.{number:04d}", inside) for kind in self.host]
        if count != (needed := sum(piece.length for piece in self.pieces)):
            raise KeyError(f"it holds {count} of the {needed} numbers of this rank's parameters")

        def read_part(task: tuple[str, str, list[Copy]]) -> None:
            kind, key, copies = task
            data = bytearray(fetch(store, key, files[key]))
            numbers = torch.frombuffer(data, dtype=torch.float32)
            for source, target, length in copies:
                self.host[kind][target : target + length] = numbers[source : source + length]

        for host in self.host.values():
            host.zero_()  # the padding, which no share holds
        in_threads(read_part, reads)


def write_objects(
    store: Store, objects: Mapping[str, bytes | memoryview]
) -> dict[str, dict[str, Any]]:
    """Write all objects; returns size and hash by key."""

    def put(item: tuple[str, bytes | memoryview]) -> tuple[str, dict[str, Any]]:
        key, data = item
        store.put(key, data)
        return key, entry_of(data)

    return dict(in_threads(put, objects.items()))


def read_whole(
    store: Store,
    folder: str,
    world_size: int,
    files: Files,
    kind: str,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Whole parameters of one kind by name, without running ranks; errors as in `Snapshot.read`."""
    pieces, at = [], 0
    for name, shape in shapes.items():
        pieces.append(Piece(name, 0, torch.Size(shape).numel(), at))
        at += pieces[-1].length
    whole = Snapshot({kind: [torch.empty(at)]}, pieces)
    whole.read(store, folder, world_size, files)
    flat = whole.host[kind]
    return {p.name: flat[p.offset : p.offset + p.length].view(*shapes[p.name]) for p in pieces}
