"""The first pass of encoding: count records, hash their content, plan the groups of work.

It reads every record and, to find near duplicates, decodes images as thumbnails.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mdm import sources
from mdm.preprocess import similar
from mdm.sources.record import RawRecord, UnforeseenError, Unit, one_record


@dataclass(frozen=True)
class Survey:
    """Hashes of one unit's n good records. Positions count all records that its reader yields.

    A record whose image cannot be decoded has no content hash (zeros) and no keys: it is no
    duplicate of anything, and the second pass says what is wrong with it. A record whose survey
    failed for an unforeseen reason is included, and `failed` gives the reason.
    """

    positions: NDArray[np.uint32]  # [n]
    ids: NDArray[np.uint64]  # [n, 2] hashes of ids
    contents: NDArray[np.uint64]  # [n, 2] hashes of all but id and origin
    signatures: NDArray[np.uint8]  # [n, SIGNATURE_BYTES], or [0, SIGNATURE_BYTES]
    key_rows: NDArray[np.uint32]  # [k] which record has the key
    keys: NDArray[np.uint64]  # [k]
    bad: int
    failed: dict[int, str] = field(default_factory=dict)  # position -> reason

    def to_bytes(self) -> bytes:
        """As its object holds it."""
        file = io.BytesIO()
        arrays: dict[str, Any] = {k: np.asarray(v) for k, v in vars(self).items() if k != "failed"}
        arrays["failed"] = np.frombuffer(json.dumps(self.failed).encode(), np.uint8)
        np.savez(file, **arrays)
        return file.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Survey":
        """The survey that `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            fields: dict[str, Any] = dict(arrays)
        failed = {int(k): v for k, v in json.loads(fields["failed"].tobytes()).items()}
        return Survey(**(fields | {"bad": int(fields["bad"]), "failed": failed}))

    def __len__(self) -> int:
        return len(self.positions) + self.bad


@dataclass(frozen=True)
class Group:
    """Units encoded together into one or more shards, and what to leave out of each."""

    index: int
    units: tuple[Unit, ...]
    left_out: tuple[dict[int, str], ...]  # of each unit: position -> reason


def survey(unit: Unit, *, near: bool) -> Survey:
    """One pass over a unit's records; signatures and keys only if `near`."""
    positions: list[int] = []
    ids: list[bytes] = []
    contents: list[bytes] = []
    signatures: list[NDArray[np.uint8]] = []
    key_rows: list[int] = []
    keys: list[int] = []
    bad, failed = 0, dict[int, str]()
    for position, record in enumerate(sources.read(unit)):
        if not isinstance(record, RawRecord):
            bad += 1
            continue
        signature = np.zeros(similar.SIGNATURE_BYTES, np.uint8)
        own_keys, content = list[int](), bytes(16)
        try:
            with one_record(record.origin):
                if near:
                    signature, own_keys = similar.signature(record)
                if record.image != b"":
                    content = content_hash(record)
        except UnforeseenError as error:
            failed[position] = str(error)
        except ValueError:
            pass  # the second pass reports it
        key_rows += [len(positions)] * len(own_keys)
        keys += own_keys
        positions.append(position)
        ids.append(_hash([record.id]))
        contents.append(content)
        signatures.append(signature)
    return Survey(
        np.array(positions, np.uint32),
        np.frombuffer(b"".join(ids), np.uint64).reshape(-1, 2),
        np.frombuffer(b"".join(contents), np.uint64).reshape(-1, 2),
        np.array(signatures if near else [], np.uint8).reshape(-1, similar.SIGNATURE_BYTES),
        np.array(key_rows, np.uint32),
        np.array(keys, np.uint64),
        bad,
        failed,
    )


def content_hash(record: RawRecord) -> bytes:
    """16 bytes, equal for records that differ at most in id and origin."""
    return _hash([repr(record.label), repr(record.text), repr(record.turns)], record.image or b"")


def _hash(texts: Sequence[str], data: bytes = b"") -> bytes:
    digest = xxhash.xxh3_128()
    for text in texts:
        part = text.encode("utf-8", "backslashreplace")
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(data)
    return digest.digest()


def plan(
    units: Sequence[Unit],
    records: Sequence[int],
    left_out: Sequence[dict[int, str]],
    shard_rows: int,
) -> list[Group]:
    """Groups of units with at least `shard_rows` records each, in a shuffled but fixed order.

    `records` and `left_out` belong to the units.
    """
    members: list[list[int]] = [[]]
    # Neighbouring units are often alike (one class, one archive): mix them before grouping.
    for number in unit_order(len(units)):
        if sum(records[m] for m in members[-1]) >= shard_rows:
            members.append([])
        members[-1].append(number)
    return [
        Group(index, tuple(units[m] for m in group), tuple(left_out[m] for m in group))
        for index, group in enumerate(members)
        if group
    ]


def unit_order(units: int) -> list[int]:
    """The fixed shuffle of units."""
    order: list[int] = np.random.Generator(np.random.Philox(key=0)).permutation(units).tolist()
    return order
