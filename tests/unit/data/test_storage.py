import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mdm.data.storage import (
    MissingObjectError,
    S3Store,
    StoreError,
    StoreOptions,
    join,
    open_store,
)
from pipelines.s3_server import S3Server


def test_objects_come_back_whole_and_in_ranges(uri: str) -> None:
    store = open_store(uri)
    assert store.put("a/one", b"0123456789")
    assert store.put("a/two", b"")
    assert store.get("a/one") == b"0123456789"
    assert store.get("a/two") == b""
    assert store.read_range("a/one", 3, 4) == b"3456"
    assert store.listing() == {"a/one": 10, "a/two": 0}
    assert store.listing("a/t") == {"a/two": 0}
    assert store.exists("a/one")
    assert not store.exists("a")
    store.put("a/one", b"new")
    assert store.get("a/one") == b"new"
    store.delete("a/one")
    store.delete("a/one")
    assert store.listing() == {"a/two": 0}


def test_what_is_not_there_is_named(uri: str) -> None:
    store = open_store(uri)
    with pytest.raises(MissingObjectError, match="nothing"):
        store.get("nothing")
    with pytest.raises(MissingObjectError, match="nothing"):
        store.read_range("nothing", 0, 1)
    assert store.listing("nothing/") == {}
    store.put("short", b"123")
    with pytest.raises(StoreError, match="ends at byte 3, before 5"):
        store.read_range("short", 1, 4)


def test_of_many_conditional_writers_one_wins(uri: str) -> None:
    store = open_store(uri)
    for turn in range(5):
        key = f"key-{turn}"
        data = [bytes([65 + i]) * 10_000 for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda d, k=key: store.put(k, d, if_absent=True), data))
        assert won.count(True) == 1
        assert store.get(key) == data[won.index(True)]


@pytest.mark.parametrize("key", ["../up", "/root", "a/../b"])
def test_no_key_leaves_the_store(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="below its store"):
        open_store(str(tmp_path)).put(key, b"")


def test_what_a_killed_writer_left_is_invisible_and_swept(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-dead").write_bytes(b"half")
    store.put("a/b", b"whole")
    assert store.listing() == {"a/b": 5}
    store.sweep()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "file://host/x"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=uri):
        open_store(uri)


def test_uris_are_joined() -> None:
    assert join("s3://bucket/a/", "b") == join("s3://bucket/a", "b") == "s3://bucket/a/b"


def test_a_server_that_is_away_is_a_clear_error_after_bounded_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
        store = S3Store("s3://bucket/x", StoreOptions(attempts=3, backoff=0.05))
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            store.put("key", b"data")
    message = str(caught.value)
    assert time.monotonic() - began < 5
    assert endpoint in message
    assert "write s3://bucket/x/key" in message
    assert "3 attempts" in message
    assert "very-secret" not in message
    assert "\n" not in message


def test_a_missing_bucket_and_wrong_keys_are_not_retried(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match="bucket does not exist"):
        open_store("s3://no-such-bucket/x").put("key", b"data")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match=r"refused it .SignatureDoesNotMatch."):
        open_store(s3).get("key")
    assert time.monotonic() - began < 5


def test_no_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="no AWS credentials"):
        open_store("s3://bucket").get("key")


@pytest.mark.chaos
def test_a_killed_server_keeps_what_it_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server(tmp_path, bucket="test") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://test/x")
        kept = {f"k{i}": bytes([i]) * 5000 for i in range(20)}
        for key, data in kept.items():
            store.put(key, data)
        server.kill()
        server.start()
        assert {key: store.get(key) for key in store.listing()} == kept
