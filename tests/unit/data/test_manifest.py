import dataclasses
import json
import pickle

import pytest

from mdm.data import manifest_parts
from mdm.data.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    Manifest,
    ManifestError,
    Quarantined,
    publish,
)
from mdm.data.manifest_parts import quarantine_parts, shard_parts
from mdm.storage import StoreError, open_store
from tests.data_sets import encoded, planned


def test_a_manifest_is_read_back_unchanged(uri: str) -> None:
    manifest = encoded(uri, [20, 13])
    loaded = Manifest.load(uri)
    assert loaded == manifest
    assert loaded.sha256 == manifest.sha256
    assert loaded == Manifest.load(f"{uri}/{MANIFEST}")
    assert loaded.rows == 33
    assert [(s, b) for s, b, _ in loaded.batches()] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_the_location_is_not_part_of_the_identity() -> None:
    manifest = planned([20])
    assert dataclasses.replace(manifest, location="elsewhere").sha256 == manifest.sha256


def test_another_version_is_refused_with_both_versions(tmp_path) -> None:
    plain = json.loads(planned([20]).to_bytes()) | {"schema_version": 7}
    with pytest.raises(ManifestError, match="schema version 7, this code reads 2"):
        Manifest.from_bytes(json.dumps(plain).encode())


def test_an_absent_unfinished_or_changed_manifest_is_refused(tmp_path) -> None:
    uri = str(tmp_path)
    with pytest.raises(ManifestError, match="holds no encoded data set"):
        Manifest.load(uri)
    manifest = encoded(uri, [20])
    (tmp_path / MANIFEST).write_bytes(manifest.to_bytes() + b" ")
    with pytest.raises(ManifestError, match=manifest.sha256):
        Manifest.load(uri)
    (tmp_path / MANIFEST_SHA256).unlink()
    with pytest.raises(ManifestError, match=MANIFEST_SHA256):
        Manifest.load(uri)


def test_one_of_two_jobs_publishes(uri: str) -> None:
    first = encoded(uri, [20])
    assert publish(open_store(uri), first) == first
    other = dataclasses.replace(first, recipe_hash="another")
    with pytest.raises(ManifestError, match="its recipe is recipe, this one's another"):
        publish(open_store(uri), other)
    assert Manifest.load(uri) == first


def test_a_manifest_in_parts_is_the_same_list_and_fetches_only_needed_parts(uri: str) -> None:
    shape = [20, 13, 8, 30, 16]
    whole, parted = planned(shape), encoded(uri, shape, part_shards=2)
    loaded = Manifest.load(uri)
    assert loaded == parted
    assert [i.rows for i in loaded.shards.infos] == [33, 38, 16]
    assert loaded.rows == 87
    assert loaded.shards.fetched == 0
    assert loaded.shards[3].rows == 30
    assert [b.rows for b in loaded.shards[2].batches] == [8]
    assert loaded.shards.fetched == 1
    assert [s.rows for s in loaded.shards] == [s.rows for s in whole.shards] == shape
    assert list(loaded.shards) == list(parted.shards)
    assert loaded.shards[-1] == loaded.shards[4]
    copy = pickle.loads(pickle.dumps(loaded))
    assert copy == loaded
    assert copy.shards[0] == loaded.shards[0]
    assert set(loaded.objects()) == set(open_store(uri).listing())


def test_a_record_batch_is_found_without_building_the_others_of_its_shard(monkeypatch) -> None:
    manifest, built = planned([1000]), []
    info = manifest_parts.BatchInfo
    monkeypatch.setattr(manifest_parts, "BatchInfo", lambda *a: built.append(a) or info(*a))
    batches = manifest.shards[0].batches
    assert batches[-1].rows == 1000 - sum(b.rows for b in batches[:-1])
    assert len(batches) == len(built)
    built.clear()
    assert manifest.shards[0].batches[1].offset
    assert len(built) == 1


def test_a_damaged_part_is_refused_by_name(tmp_path) -> None:
    manifest = encoded(str(tmp_path), [20, 13], part_shards=1)
    path = tmp_path / manifest.shards.infos[1].key
    path.write_bytes(path.read_bytes().replace(b"13", b"14"))
    loaded = Manifest.load(str(tmp_path))
    assert loaded.shards[0].rows == 20
    with pytest.raises(StoreError, match=f"{path.name} is damaged"):
        loaded.shards[1]


def test_the_quarantine_is_stored_in_parts() -> None:
    records = [Quarantined(str(i), "truncated", f"file {i}") for i in range(10)]
    manifest = dataclasses.replace(planned([20]), quarantine=quarantine_parts(records, size=4))
    assert len(manifest.quarantine) == 10
    assert list(manifest.quarantine) == records
    assert manifest.quarantine[7].id == "7"
    assert (
        dataclasses.replace(manifest, quarantine=quarantine_parts(records)).sha256
        != manifest.sha256
    )


def test_shards_whose_record_batches_do_not_add_up_are_refused() -> None:
    shard = planned([20]).shards[0]
    with pytest.raises(ManifestError, match="21 rows"):
        shard_parts([dataclasses.replace(shard, rows=21)], 8)
    apart = (
        shard.batches[0],
        dataclasses.replace(shard.batches[1], offset=9000),
        *shard.batches[2:],
    )
    with pytest.raises(ManifestError, match="ends at byte 8192, the next one begins at 9000"):
        shard_parts([dataclasses.replace(shard, batches=apart)], 8)
