import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdm.data import lease
from mdm.data.lease import LEASE, Lease, OtherJobError, hold
from mdm.data.storage import open_store

HOLDER = """
import sys, time
from mdm.data.lease import hold
from mdm.data.storage import open_store
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
        with pytest.raises(OtherJobError, match=rf"process {os.getpid()} on .*recipe-one"):
            Lease(store, "recipe-two").take()
        before = store.get(LEASE)
        deadline = time.monotonic() + 20
        while store.get(LEASE) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mine.check()
    assert store.listing() == {}
    with hold(store, "recipe-two"):
        assert json.loads(store.get(LEASE))["recipe"] == "recipe-two"


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
        other.wait()
    with hold(store, "mine"):
        assert json.loads(store.get(LEASE))["recipe"] == "mine"


def test_another_machines_lease_is_watched_and_not_its_clock(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(uri)
    there = {"token": "t", "host": "far", "machine": "m", "pid": 1, "started": 4e9, "recipe": "r"}
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
