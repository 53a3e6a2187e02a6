"""One job at a time writes to an output: the lease that it holds and renews.

The lease is a small object, replaced only if it is still the one that was read (If-Match). No clock
of another machine is trusted: a job that finds a lease of a process on its own machine asks the
kernel whether that process lives, and for another machine's it watches whether the lease changes.
A job that was asleep so long that another took over learns it from its next renewal; all that it
wrote meanwhile is named by its content, so nothing of the other's is spoilt.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mdm.data.storage import MissingObjectError, Store, StoreError

LEASE = "work/lease.json"
RENEW_SECONDS = 5.0
WATCH_SECONDS = 20.0


class OtherJobError(RuntimeError):
    """Another job writes to the same output; the message is one line for the user."""


class Lease:
    """The right to write to a store, from `take` to `release`."""

    def __init__(self, store: Store, recipe_hash: str) -> None:
        self._store = store
        self._mine = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "recipe": recipe_hash,
        }
        self._renewals = 0
        self._etag = ""
        self._lost = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lease; OtherJobError while another job lives that holds it."""
        while not self._store.put(LEASE, self._bytes(), if_absent=True):
            try:
                data, etag = self._store.read(LEASE)
            except MissingObjectError:
                continue  # given back meanwhile
            there = _parsed(data)
            if there.get("token") == self._mine["token"]:
                break  # the answer to our own request was lost
            if self._lives(there, etag):
                raise OtherJobError(
                    f"{self._store.uri} is being written by another job (process "
                    f"{there.get('pid')} on {there.get('host')}, recipe "
                    f"{str(there.get('recipe'))[:16]}): wait for it, or choose another output"
                )
            if self._store.replace(LEASE, self._bytes(), etag) is not None:
                break
        data, self._etag = self._store.read(LEASE)
        self._note_owner(data)
        self.check()
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """OtherJobError if another job has taken over."""
        if self._lost:
            raise OtherJobError(
                f"{self._store.uri} was taken over by another job ({self._lost}) while this one "
                "did not answer: nothing is lost, let the other one finish"
            )

    def release(self) -> None:
        """Give it back, unless another job has it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self._lost:
            try:
                self._store.delete(LEASE)
            except StoreError as error:
                # The next job finds this process dead.
                print(f"the lease stays behind: {error}", file=sys.stderr)  # noqa: T201

    def _bytes(self) -> bytes:
        return json.dumps(self._mine | {"renewals": self._renewals}).encode()

    def _lives(self, there: dict[str, Any], etag: str) -> bool:
        if there.get("machine") == self._mine["machine"]:
            try:
                return bool(psutil.Process(int(there["pid"])).create_time() == there["started"])
            except (psutil.Error, KeyError, ValueError):
                return False
        print(  # noqa: T201
            f"another job on {there.get('host')} has written to {self._store.uri}: watching for "
            f"{WATCH_SECONDS:.0f} s whether it still does",
            file=sys.stderr,
        )
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS / 5))
            try:
                if self._store.read(LEASE)[1] != etag:
                    return True
            except MissingObjectError:
                return False
        return False

    def _note_owner(self, data: bytes) -> None:
        there = _parsed(data)
        if there.get("token") != self._mine["token"]:
            self._lost = f"process {there.get('pid')} on {there.get('host')}"

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(RENEW_SECONDS) and not self._lost:
            try:
                self._renew()
            except StoreError:
                continue  # an outage: the job itself says so, and the lease is still ours

    def _renew(self) -> None:
        self._renewals += 1
        etag = self._store.replace(LEASE, self._bytes(), self._etag)
        if etag is None:
            try:
                data, etag = self._store.read(LEASE)
            except MissingObjectError:
                self._lost = "it has finished"
                return
            self._note_owner(data)  # ours, if only the answer was lost
        self._etag = etag


@contextmanager
def hold(store: Store, recipe_hash: str) -> Iterator[Lease]:
    """The lease for the length of a block."""
    lease = Lease(store, recipe_hash)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(data)
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}


def _machine() -> str:
    """Equal for processes that see one another's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # no such thing here: none is known to be ours
