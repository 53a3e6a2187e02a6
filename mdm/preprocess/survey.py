"""The first pass of encoding: count records, hash what they hold, plan the groups of work.

It reads every record and, where near duplicates are looked for, decodes images as thumbnails.
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
    """What one unit's n good records hold. Positions count all that its reader yields.

    A record whose image cannot be decoded has no content hash (zeros) and no keys: it is no
    duplicate of anything, so that the second pass says what is wrong with it. One that could not be
    surveyed for a reason that nobody foresaw is among them, and `failed` says why.
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
    keys: list[tuple[int, int]] = []
    nothing = np.zeros(similar.SIGNATURE_BYTES, np.uint8)
    bad, failed = 0, dict[int, str]()
    for position, record in enumerate(sources.read(unit)):
        if not isinstance(record, RawRecord):
            bad += 1
            continue
        found, meets, content = nothing, list[int](), bytes(16)
        try:
            with one_record(record.origin):
                if near:
                    found, meets = similar.signature(record)
                if record.image != b"":
                    content = content_hash(record)
        except UnforeseenError as error:
            failed[position] = str(error)
        except ValueError:
            pass  # told by the second pass
        keys += [(len(positions), key) for key in meets]
        positions.append(position)
        ids.append(_hash([record.id]))
        contents.append(content)
        signatures.append(found)
    rows, values = zip(*keys, strict=True) if keys else ((), ())
    return Survey(
        np.array(positions, np.uint32),
        np.frombuffer(b"".join(ids), np.uint64).reshape(-1, 2),
        np.frombuffer(b"".join(contents), np.uint64).reshape(-1, 2),
        np.array(signatures if near else [], np.uint8).reshape(-1, similar.SIGNATURE_BYTES),
        np.array(rows, np.uint32),
        np.array(values, np.uint64),
        bad,
        failed,
    )


def content_hash(record: RawRecord) -> bytes:
    """Equal for records that differ at most in id and origin; 16 bytes."""
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
    """Groups of at least `shard_rows` of the units' `records`, in a shuffled but fixed order."""
    groups: list[Group] = []
    members: list[int] = []
    # Neighbouring units are often alike (one class, one archive): mix them before cutting.
    for number in unit_order(len(units)):
        members.append(number)
        if sum(records[m] for m in members) >= shard_rows:
            groups.append(_group(len(groups), members, units, left_out))
            members = []
    if members:
        groups.append(_group(len(groups), members, units, left_out))
    return groups


def unit_order(units: int) -> list[int]:
    """The fixed shuffle of units."""
    order: list[int] = np.random.Generator(np.random.Philox(key=0)).permutation(units).tolist()
    return order


def _group(
    index: int,
    members: list[int],
    units: Sequence[Unit],
    left_out: Sequence[dict[int, str]],
) -> Group:
    return Group(index, tuple(units[m] for m in members), tuple(left_out[m] for m in members))
