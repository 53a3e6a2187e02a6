import dataclasses
import json

import pytest

from mdm.data.manifest import MANIFEST, MANIFEST_SHA256, Manifest, ManifestError, publish
from mdm.data.storage import open_store
from tests.data_sets import encoded, planned


def test_a_manifest_is_read_back_as_it_was(uri: str) -> None:
    manifest = encoded(uri, [20, 13])
    loaded = Manifest.load(uri)
    assert loaded == manifest
    assert loaded.sha256 == manifest.sha256
    assert loaded == Manifest.load(f"{uri}/{MANIFEST}")
    assert loaded.rows == 33
    assert [(s, b) for s, b, _ in loaded.batches()] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_the_place_is_not_part_of_the_identity() -> None:
    manifest = planned([20])
    assert dataclasses.replace(manifest, location="elsewhere").sha256 == manifest.sha256


def test_another_version_is_refused_with_both(tmp_path) -> None:
    plain = json.loads(planned([20]).to_bytes()) | {"schema_version": 7}
    with pytest.raises(ManifestError, match="schema version 7, this code reads 1"):
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


def test_of_two_jobs_one_publishes(uri: str) -> None:
    first = encoded(uri, [20])
    assert publish(open_store(uri), first) == first
    other = dataclasses.replace(first, recipe_hash="another")
    with pytest.raises(ManifestError, match="its recipe is recipe, this one's another"):
        publish(open_store(uri), other)
    assert Manifest.load(uri) == first


def test_shards_whose_batches_do_not_add_up_are_refused() -> None:
    shard = dataclasses.replace(planned([20]).shards[0], rows=21)
    with pytest.raises(ManifestError, match="21 rows"):
        dataclasses.replace(planned([20]), shards=(shard,))
