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


def test_one_job_holds_the_lease_and_gives_it_back(uri: str) -> None:
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


def test_a_killed_jobs_lease_is_taken_over_at_once_and_a_living_ones_is_not(
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
        # Nobody has taken note of its end yet, as of a rank whose launcher is busy.
        with hold(store, "at once"):
            pass
        other.wait()
    with hold(store, "mine"):
        assert json.loads(store.get(LEASE))["about"] == "mine"


def test_a_stopped_jobs_lease_is_not_taken_over_through_a_link(tmp_path: Path) -> None:
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


def test_another_machines_lease_is_watched_and_not_its_clock(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(uri)
    there = {"token": "t", "host": "far", "machine": "m", "pid": 1, "ticks": 1, "about": "r"}
    store.put(LEASE, json.dumps(there).encode())
    with hold(store, "mine"):  # it does not change: its owner is dead
        assert "far" in capsys.readouterr().err
    living = Lease(store, "theirs")
    living._mine["machine"] = "elsewhere"
    living.take()
    with pytest.raises(OtherJobError, match="being written by another job"):
        Lease(store, "mine").take()
    living.release()


def test_a_job_that_slept_learns_that_it_was_replaced(uri: str) -> None:
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


def test_a_lease_that_was_copied_with_its_folder_holds_nobody_up(tmp_path: Path) -> None:
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
def test_a_process_id_that_no_kernel_has_is_a_dead_jobs(
    tmp_path: Path, pid: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    with hold(store, "first"):
        there = json.loads(store.get(LEASE))
    store.put(LEASE, json.dumps(there | {"pid": pid}).encode())
    with hold(store, "mine") as mine:
        mine.confirm()
    assert capsys.readouterr().err == ""


def test_whatever_a_lease_holds_its_owner_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    for there in (b"half", json.dumps({"pid": 1, "host": "x", "about": "a\nb\x1b[0m"}).encode()):
        store.put(LEASE, there)
        with hold(store, "mine"):
            pass
    damaged, odd = capsys.readouterr().err.splitlines()
    assert "its lease is damaged" in damaged
    assert "process 1 on x, a?b?[0m" in odd


def test_a_lease_that_is_a_link_to_nowhere_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MISSES", 3)
    (tmp_path / "lease.json").symlink_to("/nope/lease.json")
    with (
        pytest.raises(StoreError, match="can be neither read nor made"),
        hold(open_store(str(tmp_path)), "mine", key="lease.json"),
    ):
        pass


def test_a_job_asks_before_it_commits_and_leaves_what_is_not_its_own(uri: str) -> None:
    store = open_store(uri)
    sleeper = Lease(store, "sleeper", job="run")
    sleeper.take()
    sleeper._stop.set()  # as if it had been stopped with all its threads
    sleeper.confirm()
    store.put(LEASE, json.dumps({"token": "x", "pid": 7, "host": "far", "job": "run"}).encode())
    sleeper.check()  # it does not know yet
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
def test_a_brief_command_and_a_dying_attempt_of_the_same_job_are_waited_for(
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


def test_a_folder_that_is_replaced_as_a_whole_is_leased_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with hold_folder(out, "train_autoencoder.py"):
        assert not out.exists()
        with (
            pytest.raises(OtherJobError, match=rf"^{out} is being written .*train_autoencoder"),
            hold_folder(out, "other"),
        ):
            pass
    assert list((tmp_path / "new").iterdir()) == []
