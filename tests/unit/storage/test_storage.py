import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import ConnectionClosedError

from mdm.storage import (
    ChangedObjectError,
    MissingObjectError,
    S3Store,
    StoreError,
    StoreOptions,
    join,
    open_store,
)
from mdm.storage.server import S3Server


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


def test_a_missing_object_is_named(uri: str) -> None:
    store = open_store(uri)
    with pytest.raises(MissingObjectError, match="nothing"):
        store.get("nothing")
    with pytest.raises(MissingObjectError, match="nothing"):
        store.read_range("nothing", 0, 1)
    assert store.listing("nothing/") == {}
    store.put("short", b"123")
    with pytest.raises(StoreError, match="ends at byte 3, before 5"):
        store.read_range("short", 1, 4)


def test_one_of_many_conditional_writers_wins(uri: str) -> None:
    store = open_store(uri)
    for turn in range(5):
        key = f"key-{turn}"
        data = [bytes([65 + i]) * 10_000 for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda d, k=key: store.put(k, d, if_absent=True), data))
        assert won.count(True) == 1
        assert store.get(key) == data[won.index(True)]


@pytest.mark.parametrize("key", ["../up", "/root", "a/../b"])
def test_a_key_outside_its_store_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="below its store"):
        open_store(str(tmp_path)).put(key, b"")


def test_partial_objects_of_a_killed_writer_are_invisible_and_swept(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-dead").write_bytes(b"half")
    (tmp_path / "ab" / "a").mkdir(parents=True)
    (tmp_path / "ab" / "a" / ".tmp-living").write_bytes(b"of another job, whose folder lies here")
    (tmp_path / ".tmp-dead").write_bytes(b"half")
    store.put("a/b", b"whole")
    assert store.listing() == {"a/b": 5}
    store.sweep("a/")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".tmp-living", "b"]


def test_a_disk_without_links_and_locks_has_conditional_writes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exFAT and Lustre answer, which are not available here."""

    def refuse(number: int) -> Any:
        def call(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    store = open_store(str(tmp_path))
    assert store.put("a", b"first", if_absent=True)
    assert not store.put("a", b"second", if_absent=True)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.put("b", b"%d" % n, if_absent=True), range(8)))
    assert won.count(True) == 1
    assert store.get("b") == b"%d" % won.index(True)
    data, etag = store.read("a")
    assert data == b"first"
    assert store.replace("a", b"third", etag) is not None
    assert store.replace("a", b"fourth", etag) is None
    assert store.listing() == {"a": 5, "b": 1}
    monkeypatch.setattr(os, "link", refuse(errno.ENOSPC))
    with pytest.raises(StoreError, match="No space left"):
        store.put("c", b"", if_absent=True)


def test_neither_a_sweep_nor_vanishing_empty_folders_disturb_writers(
    tmp_path: Path,
) -> None:
    """As when a second job tries to take the lease while the first one begins."""
    store, done = open_store(str(tmp_path / "store")), threading.Event()

    def sweep() -> None:
        while not done.wait(0.03):
            store.sweep("a/")

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for n in range(100):
            assert store.put(f"a/{n}", b"whole", if_absent=True)
            store.delete(f"a/{n}")
    finally:
        done.set()
        sweeper.join()


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "file://host/x"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=uri):
        open_store(uri)


def test_uris_are_joined() -> None:
    assert join("s3://bucket/a/", "b") == join("s3://bucket/a", "b") == "s3://bucket/a/b"


def test_an_unreachable_server_is_a_clear_error_after_bounded_attempts(
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


def test_missing_credentials_are_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="no AWS credentials"):
        open_store("s3://bucket").get("key")


@pytest.mark.chaos
def test_a_killed_server_keeps_acknowledged_objects(
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


PART = 5 << 20


def uploads(store: S3Store) -> list[str]:
    page = store.requests.client.list_multipart_uploads(Bucket="test", Prefix=store.requests.prefix)
    return [found["Key"].removeprefix(store.requests.prefix) for found in page.get("Uploads", ())]


def test_a_large_object_is_uploaded_in_parts_once(s3: str) -> None:
    store = S3Store(s3, StoreOptions(part_bytes=PART))
    data = bytes(range(256)) * (2 * PART // 256) + b"end"
    assert store.put("large", data, if_absent=True)
    assert store.get("large") == data
    assert store.read_range("large", PART - 2, 4) == data[PART - 2 : PART + 2]
    assert not store.put("large", b"other" * PART, if_absent=True)
    assert store.get("large") == data
    assert store.put("large", data[1:])
    assert store.listing() == {"large": len(data) - 1}
    assert uploads(store) == []
    with ThreadPoolExecutor(3) as pool:
        bodies = [bytes([65 + i]) * (PART + 1) for i in range(3)]
        won = list(pool.map(lambda d: store.put("raced", d, if_absent=True), bodies))
    # S3 checks the condition when it commits, but this server checks shortly before: more than one
    # of three racing multipart uploads may win. Objects of that size are named by their hash.
    assert store.get("raced") in [body for body, first in zip(bodies, won, strict=True) if first]
    assert uploads(store) == []


@pytest.mark.parametrize("gone", [False, True])
def test_an_upload_whose_answer_is_lost_is_looked_up(s3: str, gone: bool) -> None:
    store = S3Store(s3, StoreOptions(part_bytes=PART, backoff=0.01))
    answers: list[int] = []

    def lose_the_first(http_response: Any, **_: Any) -> None:
        answers.append(http_response.status_code)
        if len(answers) == 1:
            if gone:
                store.delete("large")
            raise ConnectionClosedError(endpoint_url="")

    events, event = store.requests.client.meta.events, "after-call.s3.CompleteMultipartUpload"
    events.register(event, lose_the_first)
    try:
        if gone:
            with pytest.raises(
                StoreError, match=r"write s3://.*/large: the server lost the upload"
            ):
                store.put("large", bytes(PART + 1))
        else:
            assert store.put("large", bytes(PART + 1))
    finally:
        events.unregister(event, lose_the_first)
    assert answers == [200, 404 if gone else 200]  # this server remembers completed uploads
    assert store.listing() == ({} if gone else {"large": PART + 1})


def test_parts_of_a_failed_upload_are_removed_and_those_of_a_killed_writer_are_swept(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(s3, StoreOptions(part_bytes=PART, attempts=2, backoff=0.01))
    direct = os.environ["AWS_ENDPOINT_URL"]
    with Relay(s3_port()) as relay:
        relay.refuse = b"partNumber=2"
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        with pytest.raises(StoreError, match=r"write part 2 of .*large .*failed after 2 attempts"):
            store.put("large", b"x" * (2 * PART + 1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", direct)
    assert uploads(store) == []
    assert store.listing() == {}
    store.requests.client.create_multipart_upload(**store.requests.at("killed"))
    other = S3Store(s3 + "-other", StoreOptions())
    other.requests.client.create_multipart_upload(**other.requests.at("living"))
    nested = S3Store(f"{s3}/nested", StoreOptions())
    nested.requests.client.create_multipart_upload(**nested.requests.at("killed-not"))
    assert sorted(uploads(store)) == ["killed", "nested/killed-not"]
    store.sweep("kill", "parts/")
    assert uploads(store) == ["nested/killed-not"]
    assert uploads(other) == ["living"]
    other.sweep("living")
    nested.sweep("killed")
    assert uploads(store) == []


def test_ranges_of_an_object_come_from_one_version(s3: str) -> None:
    store = open_store(s3)
    store.put("a", b"0123456789")
    assert store.read_range("a", 0, 2) == b"01"
    open_store(s3).put("a", b"abcdefghij")  # by somebody else
    with pytest.raises(ChangedObjectError, match=r"a was replaced while it was being read"):
        store.read_range("a", 2, 2)
    assert open_store(s3).read_range("a", 2, 2) == b"cd"
    store.put("a", b"ABCDEFGHIJ")  # its own change is expected
    assert store.read_range("a", 2, 2) == b"CD"


def test_an_object_is_replaced_only_if_it_is_still_the_one_that_was_read(uri: str) -> None:
    store = open_store(uri)
    assert store.replace("pointer", b"one", "none") is None
    store.put("pointer", b"one")
    data, etag = store.read("pointer")
    assert data == b"one"
    with ThreadPoolExecutor(6) as pool:
        tags = list(pool.map(lambda i: store.replace("pointer", b"by %d" % i, etag), range(6)))
    assert sum(tag is not None for tag in tags) == 1
    winner = next(i for i, tag in enumerate(tags) if tag is not None)
    assert store.read("pointer") == (b"by %d" % winner, tags[winner])


def test_a_broken_download_continues_where_it_broke(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).bytes(20 << 20)
    options = StoreOptions(backoff=0.01)
    S3Store(s3, options).put("large", data)
    with Relay(s3_port()) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        store = S3Store(s3, options)
        relay.cut_after = 9 << 20
        assert store.get("large") == data
        assert relay.cuts == 1
        assert relay.sent < len(data) + (5 << 20)  # 8 of the 9 MiB are not requested again
        relay.cut_after = 9 << 20
        assert store.read_range("large", 1000, 15 << 20) == data[1000 : 1000 + (15 << 20)]
        assert relay.cuts == 2


def test_a_slow_download_ends_at_the_deadline(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    S3Store(s3, StoreOptions()).put("large", bytes(40 << 20))
    with Relay(s3_port()) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        relay.pause = 0.4  # seconds a mebibyte
        began = time.monotonic()
        with pytest.raises(StoreError, match="deadline"):
            S3Store(s3, StoreOptions(deadline=2.0)).get("large")
        assert time.monotonic() - began < 12


@pytest.mark.parametrize("checksum", ["none", "CRC32", "SHA1", "SHA256"])
def test_uploads_carry_the_configured_checksum(s3: str, checksum: str) -> None:
    store = S3Store(s3, StoreOptions(checksum=checksum, part_bytes=PART))
    store.put("small", b"small")
    store.put("large", bytes(PART + 1))
    sums = {
        key: {
            name
            for name in store.requests.client.head_object(
                **store.requests.at(key), ChecksumMode="ENABLED"
            )
            if name.startswith("Checksum") and name != "ChecksumType"
        }
        for key in ("small", "large")
    }
    wanted = set() if checksum == "none" else {f"Checksum{checksum}"}
    assert sums == {"small": wanted, "large": wanted}
    assert (store.get("small"), len(store.get("large"))) == (b"small", PART + 1)


def test_every_upload_requests_encryption(s3: str) -> None:
    """This server has no keys and refuses: the requests are what counts."""
    store = S3Store(s3, StoreOptions(sse="aws:kms", sse_key_id="key-1", attempts=1))
    requests: list[Any] = []
    events = store.requests.client.meta.events
    events.register("before-send.s3", lambda request, **_: requests.append(request))
    with pytest.raises(StoreError, match="write"):
        store.put("small", b"small")
    with pytest.raises(StoreError, match="write"):
        store.put("large", bytes(17 << 20))
    begun = [r for r in requests if "partNumber" not in r.url and r.method in ("PUT", "POST")]
    assert {r.method for r in begun} == {"PUT", "POST"}  # whole, and begun in parts
    for headers in (r.headers for r in begun):
        assert headers["x-amz-server-side-encryption"] == b"aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == b"key-1"


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDM_STORE_SSE", "AES256")
    monkeypatch.setenv("MDM_STORE_DEADLINE", "7.5")
    monkeypatch.setenv("MDM_STORE_ATTEMPTS", "3")
    store = open_store("s3://bucket/x")
    assert isinstance(store, S3Store)
    assert store.options == StoreOptions(sse="AES256", deadline=7.5, attempts=3)
    for name, value, message in [
        ("MDM_STORE_ATTEMPTS", "many", "MDM_STORE_ATTEMPTS is 'many', not a number"),
        ("MDM_STORE_SSE", "rot13", "sse is 'rot13'; choose AES256, aws:kms"),
        ("MDM_STORE_CHECKSUM", "md5", "checksum is 'md5'; choose one of none, CRC32, SHA1"),
        ("MDM_STORE_DEADLIN", "1", "MDM_STORE_DEADLIN is not an option"),
        ("MDM_STORE_SSE_KEY_ID", "k", "sse_key_id is set, but sse is 'AES256'"),
        ("MDM_STORE_PART_BYTES", "1000", "part_bytes is 1000"),
    ]:
        with monkeypatch.context() as here:
            here.setenv(name, value)
            with pytest.raises(ValueError, match=message):
                open_store("s3://bucket/x")


def s3_port() -> int:
    return int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])


class Relay:
    """A TCP relay in front of the S3 server: truncates or slows answers, or drops requests."""

    def __init__(self, port_behind: int) -> None:
        self.port_behind = port_behind
        self.cut_after = 0  # bytes of the next large answer
        self.pause = 0.0
        self.refuse = b""  # closes the connection of requests whose first bytes contain this
        self.cuts = self.sent = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{port}"

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.port_behind))
            for part in (self._up, self._down):
                threading.Thread(target=part, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        for data in received(client):
            if self.refuse and self.refuse in data:
                break
            server.sendall(data)
        for end in (client, server):
            close(end)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        try:
            for data in received(server):
                passed += len(data)
                if self.cut_after and passed > self.cut_after:
                    self.cut_after, self.cuts = 0, self.cuts + 1
                    break
                if self.pause:
                    time.sleep(self.pause * len(data) / (1 << 20))
                self.sent += len(data)
                client.sendall(data)
        except OSError:
            pass
        for end in (client, server):
            close(end)


def received(end: socket.socket) -> Iterator[bytes]:
    try:
        while data := end.recv(1 << 18):
            yield data
    except OSError:
        return


def close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
