"""The first pass of encoding: count records, find duplicates, plan the groups of work.

It reads every record but decodes none. Its results are small: two hashes a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from mdm import sources
from mdm.sources.record import RawRecord, Unit

DUPLICATE = "duplicate"  # the same content again: dropped
ID_TAKEN = "id taken by another record"  # other content under the same id: quarantined


@dataclass(frozen=True)
class Survey:
    """What one unit holds. Positions count everything its reader yields, bad records too."""

    records: tuple[tuple[int, str, str], ...]  # position, hash of the id, hash of the content
    bad: int

    def to_json(self) -> dict[str, Any]:
        """As a receipt holds it."""
        return {"records": [list(r) for r in self.records], "bad": self.bad}

    @staticmethod
    def from_json(plain: dict[str, Any]) -> "Survey":
        """The survey that `to_json` wrote."""
        return Survey(tuple((p, i, c) for p, i, c in plain["records"]), plain["bad"])

    def __len__(self) -> int:
        return len(self.records) + self.bad


@dataclass(frozen=True)
class Group:
    """Units encoded together into one or more shards, and what to leave out of each."""

    index: int
    units: tuple[Unit, ...]
    left_out: tuple[dict[int, str], ...]  # of each unit: position -> DUPLICATE or ID_TAKEN


def survey(unit: Unit) -> Survey:
    """One pass over a unit's records."""
    found: list[tuple[int, str, str]] = []
    bad = 0
    for position, record in enumerate(sources.get(unit.source).read(unit)):
        if isinstance(record, RawRecord):
            found.append((position, _hash([record.id]), content_hash(record)))
        else:
            bad += 1
    return Survey(tuple(found), bad)


def content_hash(record: RawRecord) -> str:
    """Equal for records that differ at most in id and origin."""
    return _hash([repr(record.label), repr(record.text), repr(record.turns)], record.image or b"")


def _hash(texts: Sequence[str], data: bytes = b"") -> str:
    digest = xxhash.xxh3_128()
    for text in texts:
        part = text.encode("utf-8", "backslashreplace")
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(data)
    return digest.hexdigest()


def plan(units: Sequence[Unit], surveys: Sequence[Survey], shard_rows: int) -> list[Group]:
    """Groups of at least `shard_rows` records, from units in a shuffled but fixed order.

    Of records that are alike, the first in the units' own order stays.
    """
    ids: set[str] = set()
    contents: set[str] = set()
    left_out: list[dict[int, str]] = []
    for found in surveys:
        out: dict[int, str] = {}
        for position, record_id, content in found.records:
            if content in contents:
                out[position] = DUPLICATE
            elif record_id in ids:
                out[position] = ID_TAKEN
            else:
                ids.add(record_id)
                contents.add(content)
        left_out.append(out)
    groups: list[Group] = []
    members: list[int] = []
    # Neighbouring units are often alike (one class, one archive): mix them before cutting.
    for number in np.random.Generator(np.random.Philox(key=0)).permutation(len(units)).tolist():
        members.append(number)
        if sum(len(surveys[m]) for m in members) >= shard_rows:
            groups.append(_group(len(groups), members, units, left_out))
            members = []
    if members:
        groups.append(_group(len(groups), members, units, left_out))
    return groups


def _group(
    index: int, members: list[int], units: Sequence[Unit], left_out: list[dict[int, str]]
) -> Group:
    return Group(index, tuple(units[m] for m in members), tuple(left_out[m] for m in members))
