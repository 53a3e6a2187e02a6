"""One job at a time writes to a place: the lease that it holds and renews.

A lease is a small object that is replaced only if it is still the one that was read (If-Match). No
other machine's clock is trusted. If a lease belongs to a process on the same machine, the kernel
tells whether that process is alive; a lease from another machine is watched for changes. A job that
was suspended so long that another one took over learns this from `confirm` or its next renewal.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mdm.storage import LocalStore, MissingObjectError, Store, StoreError
from mdm.utils.files import parse

log = logging.getLogger("mdm")

LEASE = "work/lease.json"  # of an encoded data set
RENEW_SECONDS = 5.0
WATCH_SECONDS = 20.0
PATIENCE_SECONDS = 300.0  # for an earlier attempt of the same job, or a brief command, to end
MISSES = 50  # attempts at a lease that can be neither created nor read


class OtherJobError(ValueError):
    """Another job writes to the same place; the message is one line for the user.

    `same_job` is true if it is another attempt of this job.
    """

    def __init__(self, message: str, *, same_job: bool = False) -> None:
        super().__init__(message)
        self.same_job = same_job


class Lease:
    """The right to write to a store, from `take` to `release`.

    Args:
        store: holds the lease.
        about: describes this job to others: `recipe 1234`, `run /runs/a`.
        key: the lease's object.
        place: what messages call the store; its URI if empty.
        advice: what a second job could do instead of waiting.
        job: equal for all attempts of one supervised job; empty without a supervisor.
        brief: others wait for this job instead of being refused.
    """

    def __init__(
        self,
        store: Store,
        about: str,
        *,
        key: str = LEASE,
        place: str = "",
        advice: str = "choose another output",
        job: str = "",
        brief: bool = False,
    ) -> None:
        self._store, self._key, self._advice = store, key, advice
        self._place = place or store.uri
        self._content = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "ticks": _start_ticks(os.getpid()),
            "place": place_of(store),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),  # for people; no program compares it
            "about": about,
            "job": job,
            "brief": brief,
        }
        self._renewals = 0
        self._etag = ""
        self._lost: OtherJobError | None = None
        self._watched = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Takes the lease; OtherJobError if a living job holds it, StoreError in an outage."""
        end, missed = time.monotonic() + PATIENCE_SECONDS, 0
        while not self._store.put(self._key, self._bytes(), if_absent=True):
            try:
                data, etag = self._store.read(self._key)
            except MissingObjectError:  # released meanwhile, or a dangling link
                missed += 1
                if missed > MISSES:
                    raise StoreError(
                        f"{self._place}/{self._key} can be neither read nor created: remove it"
                    ) from None
                time.sleep(0.1)
                continue
            owner = _parsed(data)
            if owner.get("token") == self._content["token"]:
                break  # the answer to our own request was lost
            if self._is_alive(owner, etag):
                same = self._is_same_job(owner)
                if not (same or owner.get("brief")) or time.monotonic() > end:
                    raise OtherJobError(
                        f"{self._place} is being written by another job ({_named(owner)}): wait "
                        f"for it, or {self._advice}",
                        same_job=same,
                    )
                time.sleep(0.2)
            elif self._store.replace(self._key, self._bytes(), etag) is not None:
                break
        self.confirm()
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether this job knows that another one has taken over."""
        return self._lost is not None

    def check(self) -> None:
        """OtherJobError if this job knows that another one has taken over."""
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """Asks the store; OtherJobError if another job has taken over, StoreError in an outage."""
        self.check()
        etag = self._read_etag()
        if self._thread is None:
            self._etag = etag
        self.check()

    def release(self) -> None:
        """Removes the lease, unless another job holds it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            with suppress(OtherJobError):
                self.confirm()
                self._store.delete(self._key)
        except (StoreError, OSError) as error:
            # The next job will see that this process is dead.
            log.warning("the lease stays behind: %s", error)

    def _bytes(self) -> bytes:
        return json.dumps(self._content | {"renewals": self._renewals}).encode()

    def _is_same_job(self, owner: dict[str, Any]) -> bool:
        return bool(self._content["job"]) and owner.get("job") == self._content["job"]

    def _is_alive(self, owner: dict[str, Any], etag: str) -> bool:
        # A lease that was copied with its folder is not the one that its process renews.
        if all(owner.get(name) == self._content[name] for name in ("machine", "place")):
            running = _is_running(owner.get("pid"), owner.get("ticks"))
            if running is not None:
                return running
        if not self._watched:
            self._watched = True
            text = "another job (%s) has written to %s: watching for %.0f s whether it still does"
            log.warning(text, _named(owner), self._place, WATCH_SECONDS)
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS / 5))
            try:
                if self._store.read(self._key)[1] != etag:
                    return True
            except MissingObjectError:
                return False
        return False

    def _read_etag(self) -> str:
        """The ETag of the lease; notes if it belongs to another job."""
        try:
            data, etag = self._store.read(self._key)
        except MissingObjectError:
            data, etag = b"", ""
        owner = _parsed(data)
        if owner.get("token") != self._content["token"]:
            name = _named(owner) if owner else f"it has finished, or {self._key} was deleted"
            self._lost = OtherJobError(
                f"{self._place} was taken over by another job ({name}) while this one did not "
                "answer: nothing is lost, let the other one finish",
                same_job=self._is_same_job(owner),
            )
        return etag

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(RENEW_SECONDS) and not self.lost:
            self._renewals += 1
            try:
                etag = self._store.replace(self._key, self._bytes(), self._etag)
                # None: another job holds it, or only the answer to the last renewal was lost.
                self._etag = self._read_etag() if etag is None else etag
            except (StoreError, OSError):
                continue  # an outage: the job itself reports it, and the lease is still ours


@contextmanager
def hold(store: Store, about: str, **options: Any) -> Iterator[Lease]:
    """The lease for the length of a block; `options` are those of `Lease`."""
    lease = Lease(store, about, **options)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def hold_folder(folder: Path, about: str) -> Iterator[Lease]:
    """A lease of an output folder that may be replaced as a whole: it lies beside the folder.

    If its parent cannot be written, as with a container's volume, the lease lies in the folder.
    """
    folder = folder.resolve()
    at = folder.parent
    if at.exists() and not os.access(at, os.W_OK):
        at = folder
    key = f".{folder.name}.lease.json"
    with hold(LocalStore(at), about, key=key, place=str(folder)) as lease:
        yield lease


def place_of(store: Store) -> str:
    """Equal for stores of one place, whichever links lead to it."""
    return str(store.root.resolve()) if isinstance(store, LocalStore) else store.uri


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        return parse(data, {})
    except ValueError:
        return {}


def _named(owner: dict[str, Any]) -> str:
    """The owner of a lease in one printable line, whatever the lease holds."""
    if "pid" not in owner and "host" not in owner:
        return "its lease is damaged and does not say which"
    since = f" since {owner['since']}" if owner.get("since") else ""
    about = f", {owner['about']}" if owner.get("about") else ""
    line = f"process {owner.get('pid')} on {owner.get('host')}{since}{about}"
    return "".join(c if c.isprintable() else "?" for c in line)


def _machine() -> str:
    """Equal for processes that see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # unknown: no lease counts as one of this machine


def _stat(pid: int) -> list[str]:
    """The fields of a process after its name, beginning with its state; OSError if not visible."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def _start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since boot; -1 if unknown."""
    try:
        return int(_stat(pid)[19])
    except (OSError, IndexError, ValueError):
        return -1


def _is_running(pid: Any, ticks: Any) -> bool | None:
    """Whether this very process runs on this machine; None if unknown.

    A process that is exiting or a zombie does not count: it writes nothing any more.
    """
    if not isinstance(pid, int) or not isinstance(ticks, int) or pid < 1 or ticks < 0:
        return None
    try:
        fields = _stat(pid)
        dead = fields[0] in "ZX" or int(fields[6]) & 0x4  # PF_EXITING
        return not dead and int(fields[19]) == ticks
    except (OSError, IndexError, ValueError):
        # Gone, or hidden because it is another user's.
        try:
            with suppress(PermissionError):
                os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):  # OverflowError: no kernel has such ids
            return False
        return None
