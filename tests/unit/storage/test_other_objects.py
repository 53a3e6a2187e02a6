"""Folder markers, other people's objects, and names that URIs have to encode."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdm.checkpoint.checkpoints import Checkpoints, Keep
from mdm.data.cache import NodeCache
from mdm.data.manifest import Manifest
from mdm.preprocess.publish import clean
from mdm.preprocess.verify import report, verify
from mdm.storage import LocalStore, StoreError, join, open_store
from tests.data_sets import encoded

ODD = "a b,c%41+#?é漢=:;&'(~"


def litter(uri: str, *below: str) -> list[str]:
    """Puts folder markers of each kind and other people's objects below these prefixes.

    Returns the keys of the latter.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        client: Any = boto3.client("s3", region_name="us-east-1")
        for marker in ("/", *(f"/{b}" for b in below), *(f"/{b[:-1]}_$folder$" for b in below)):
            client.put_object(Bucket=bucket, Key=prefix + marker, Body=b"")
    else:
        for b in below:
            Path(uri, b, "an empty folder", "in it").mkdir(parents=True)
            Path(uri, f"{b[:-1]}_$folder$").touch()
    others = [f"{b}{name}" for b in ("", *below) for name in ("README", ".DS_Store", "_SUCCESS")]
    for key in others:
        open_store(uri).put(key, b"" if "_" in key else b"other people's")
    return others


def test_folder_markers_and_other_peoples_objects_do_not_disturb_a_data_set(uri: str) -> None:
    encoded(uri, [16, 8])
    others = litter(uri, "shards/", "parts/", "work/")
    manifest = Manifest.load(uri)
    verdicts = list(verify(manifest))
    assert not [v for v in verdicts if v.problems]
    assert sorted(verdicts[-1].notes) == sorted(
        f"{key} belongs to no data set; it is left alone" for key in others
    )
    store = open_store(uri)
    store.put("shards/left.arrow", b"over")
    assert list(verify(manifest))[-1].problems == ("shards/left.arrow belongs to no data set",)
    lines: list[str] = []
    assert report(uri, True, lines.append) == 1
    assert [line for line in lines if "deleted" in line] == ["  deleted shards/left.arrow"]
    store.put("parts/left.json", b"over")
    clean(store, manifest)
    assert set(others) <= set(store.listing())
    assert "parts/left.json" not in store.listing()
    assert not [v for v in verify(Manifest.load(uri)) if v.problems]


def test_a_manifest_without_quarantine_counts_or_card_is_verified(tmp_path: Path) -> None:
    manifest = dataclasses.replace(encoded(str(tmp_path), [8]), card_sha256="")
    manifest = dataclasses.replace(manifest, counts={"examples": manifest.rows})
    (tmp_path / "card.json").unlink()
    assert not [v for v in verify(manifest) if v.problems]


def test_checkpoints_are_found_pruned_and_claimed_among_other_peoples_objects(uri: str) -> None:
    checkpoints = Checkpoints.at(uri)
    for step in (1, 2):
        name = checkpoints.claim(step)
        checkpoints.store.put(f"{name}/rank-00000/weights.0000", b"x")
        state = {"step": step, "loss": None}
        checkpoints.commit(name, {"world_size": 1, "state": state, "files": {}})
    others = litter(uri, "step-00000001/", "step-00000001/rank-00000/", "step-00000003/")
    records, passed = checkpoints.newest_first()
    assert [r.step for r in records] == [2, 1]
    assert passed == []
    assert checkpoints.claim(3) == "step-00000003"
    assert checkpoints.prune(Keep(newest=1), asides=True) == ["step-00000003", "step-00000001"]
    assert set(others) <= set(checkpoints.store.listing())
    assert [r.step for r in checkpoints.newest_first()[0]] == [2]


def test_a_node_cache_leaves_other_peoples_files_and_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "files" / "a folder").mkdir(parents=True)
    (tmp_path / "files" / ".DS_Store").write_bytes(bytes(2000))
    cache = NodeCache(tmp_path, 1000)
    for i in range(20):
        cache.put(f"f{i}", [bytes(100)])
    assert not cache.is_full
    assert cache.read("f19", 0, 1) is not None
    assert (tmp_path / "files" / ".DS_Store").stat().st_size == 2000
    assert (tmp_path / "files" / "a folder").is_dir()


def test_keys_and_prefixes_with_odd_characters_come_back(uri: str) -> None:
    at = join(uri, ODD)
    store = open_store(at)
    for key in (ODD, f"{ODD}x/{ODD}", "a+b", "a b", "a%20b"):
        store.put(key, key.encode())
    assert set(store.listing()) == {ODD, f"{ODD}x/{ODD}", "a+b", "a b", "a%20b"}
    for key in store.listing():
        assert open_store(at).get(key) == key.encode()
        assert bytes(store.read_range(key, 1, 2)) == key.encode()[1:3]
    assert set(open_store(uri).listing(f"{ODD}/a")) == {f"{ODD}/{k}" for k in store.listing("a")}
    store.delete("a b")
    assert not store.exists("a b")
    assert store.exists("a+b")
    encoded(join(at, "set"), [8])
    assert not [v for v in verify(Manifest.load(join(at, "set"))) if v.problems]


names = st.binary(min_size=1, max_size=20).filter(
    lambda b: not {0, 47} & set(b) and b not in (b".", b"..")
)


def test_a_store_below_a_file_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*file/a/b: Not a directory"):
        open_store(str(tmp_path / "file" / "a")).put("b", b"")


@given(parts=st.lists(names.map(os.fsdecode), min_size=1, max_size=3))
def test_a_file_uri_names_the_path_it_was_made_from(parts: list[str]) -> None:
    path = Path("/", *parts)
    store = open_store(path.as_uri())
    assert isinstance(store, LocalStore)
    assert store.root == path
    joined = open_store(join(path.parent.as_uri(), parts[-1]))
    assert isinstance(joined, LocalStore)
    assert joined.root == path


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("file:/tmp/a%20b", "/tmp/a b"),
        ("file:///tmp/x#1", "/tmp/x#1"),
        ("file:///tmp/x?y=1", "/tmp/x?y=1"),
        ("file:///tmp/x%231%3F", "/tmp/x#1?"),
        ("file:///tmp/%2541", "/tmp/%41"),
        ("file://localhost/tmp/%C3%A9+%2B", "/tmp/é++"),
        ("/tmp/a%20b#c", "/tmp/a%20b#c"),
    ],
)
def test_file_uris_are_decoded_and_plain_folders_are_not(uri: str, path: str) -> None:
    store = open_store(uri)
    assert isinstance(store, LocalStore)
    assert str(store.root) == path
    below = open_store(join(uri, "b %41"))
    assert isinstance(below, LocalStore)
    assert str(below.root) == f"{path}/b %41"


@pytest.mark.parametrize("uri", ["file://nas/tmp", "file://tmp", "file://", "file:///a%00b"])
def test_file_uris_of_other_hosts_or_without_a_path_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"names (the host|a path)"):
        open_store(uri)
