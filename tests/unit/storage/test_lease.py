import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mdm.storage import StoreError, lease, open_store
from mdm.storage.lease import LEASE, Lease, OtherJobError, hold, hold_folder

HOLDER = """
import sys, time
from mdm.storage.lease import hold
from mdm.storage import open_store
with hold(open_store(sys.argv[1]), "theirs"):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.0)


def test_one_job_holds_the_lease_and_releases_it(uri: str) -> None:
    store = open_store(uri)
    with hold(store, "recipe-one") as mine:
        named = rf"process {os.getpid()} on .* since 2.*, recipe-one\)"
        with pytest.raises(OtherJobError, match=named):
            Lease(store, "recipe-two").take()
        before = store.get(LEASE)
        deadline = time.monotonic() + 20
        while store.get(LEASE) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mine.check()
    assert store.listing() == {}
    with hold(store, "recipe-two"):
        assert json.loads(store.get(LEASE))["about"] == "recipe-two"


def test_the_lease_of_a_killed_job_is_taken_over_at_once_and_that_of_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    store = open_store(str(tmp_path))
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OtherJobError, match=f"process {other.pid}"):
            Lease(store, "mine").take()
        other.kill()
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        # A zombie: its parent has not waited for it yet, like a rank with a busy launcher.
        with hold(store, "at once"):
            pass
        other.wait()
    with hold(store, "mine"):
        assert json.loads(store.get(LEASE))["about"] == "mine"


def test_the_lease_of_a_suspended_job_is_not_taken_over_through_a_link(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    link.symlink_to(folder)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(OtherJobError, match=f"process {other.pid}"):
                Lease(open_store(str(link)), "mine").take()
        finally:
            other.kill()


def test_a_lease_of_another_machine_is_watched_whatever_its_clock(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(uri)
    there = {"token": "t", "host": "far", "machine": "m", "pid": 1, "ticks": 1, "about": "r"}
    store.put(LEASE, json.dumps(there).encode())
    with hold(store, "mine"):  # it does not change, so its owner is dead
        assert "far" in caplog.text
    living = Lease(store, "theirs")
    living._content["machine"] = "elsewhere"
    living.take()
    with pytest.raises(OtherJobError, match="being written by another job"):
        Lease(store, "mine").take()
    living.release()


def test_a_suspended_job_learns_that_another_took_over(uri: str) -> None:
    store = open_store(uri)
    sleeper = Lease(store, "sleeper")
    sleeper.take()
    store.put(LEASE, json.dumps({"token": "x", "pid": 7, "host": "far"}).encode())
    deadline = time.monotonic() + 20
    while not sleeper._lost:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(OtherJobError, match=r"taken over by another job .process 7 on far."):
        sleeper.check()
    sleeper.release()
    assert LEASE in store.listing()  # not ours to remove


def test_a_lease_copied_with_its_folder_blocks_no_job(tmp_path: Path) -> None:
    original, copy = open_store(str(tmp_path / "one")), open_store(str(tmp_path / "two"))
    with hold(original, "living"):
        copy.put(LEASE, original.get(LEASE))
        with hold(copy, "of the copy") as mine:
            mine.confirm()


@pytest.mark.parametrize(
    "data", [b"", b"[1]", b'{"machine": 1, "pid": "x"}', b"\xff\0", b"[" * 200_000]
)
def test_a_damaged_lease_is_watched_and_taken_over(tmp_path: Path, data: bytes) -> None:
    store = open_store(str(tmp_path))
    store.put(LEASE, data)
    with hold(store, "mine") as mine:
        mine.confirm()


@pytest.mark.parametrize("pid", [2**31, 2**63, 10**30])
def test_an_impossible_process_id_belongs_to_a_dead_job(
    tmp_path: Path, pid: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    with hold(store, "first"):
        there = json.loads(store.get(LEASE))
    store.put(LEASE, json.dumps(there | {"pid": pid}).encode())
    with hold(store, "mine") as mine:
        mine.confirm()
    assert caplog.text == ""


def test_the_owner_is_named_in_one_line_whatever_the_lease_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    for there in (b"half", json.dumps({"pid": 1, "host": "x", "about": "a\nb\x1b[0m"}).encode()):
        store.put(LEASE, there)
        with hold(store, "mine"):
            pass
    damaged, odd = caplog.messages
    assert "its lease is damaged" in damaged
    assert "process 1 on x, a?b?[0m" in odd


def test_a_lease_that_is_a_dangling_link_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MISSES", 3)
    (tmp_path / "lease.json").symlink_to("/nope/lease.json")
    with (
        pytest.raises(StoreError, match="can be neither read nor created"),
        hold(open_store(str(tmp_path)), "mine", key="lease.json"),
    ):
        pass


def test_a_job_confirms_before_it_commits_and_leaves_the_lease_of_another(uri: str) -> None:
    store = open_store(uri)
    sleeper = Lease(store, "sleeper", job="run")
    sleeper.take()
    sleeper._stop.set()  # as if all its threads were suspended
    sleeper.confirm()
    store.put(LEASE, json.dumps({"token": "x", "pid": 7, "host": "far", "job": "run"}).encode())
    sleeper.check()  # does not know yet
    with pytest.raises(OtherJobError, match=r"taken over by another job .process 7 on far") as one:
        sleeper.confirm()
    assert one.value.same_job
    assert sleeper.lost
    sleeper.release()
    assert LEASE in store.listing()
    other = Lease(store, "other")
    other.take()
    other._stop.set()
    store.delete(LEASE)
    with pytest.raises(OtherJobError, match=r"it has finished, or work/lease\.json was deleted"):
        other.confirm()
    other.release()


@pytest.mark.parametrize("options", [{"brief": True}, {"job": "supervised"}])
def test_a_job_waits_for_a_brief_command_and_for_an_earlier_attempt(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    former = Lease(store, "former", **options)
    former.take()
    threading.Timer(0.5, former.release).start()
    with hold(store, "mine", job="supervised"):
        assert json.loads(store.get(LEASE))["about"] == "mine"
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.5)
    with hold(store, "former", **options):
        with pytest.raises(OtherJobError) as refused:
            Lease(store, "mine", job="supervised").take()
        assert refused.value.same_job == ("job" in options)
        with pytest.raises(OtherJobError) as refused:
            Lease(store, "mine", job="another").take()
        assert not refused.value.same_job


def test_the_lease_of_a_folder_that_is_replaced_lies_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with hold_folder(out, "train_autoencoder.py"):
        assert not out.exists()
        with (
            pytest.raises(OtherJobError, match=rf"^{out} is being written .*train_autoencoder"),
            hold_folder(out, "other"),
        ):
            pass
    assert list((tmp_path / "new").iterdir()) == []
