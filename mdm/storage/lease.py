"""One job at a time writes to a place: the lease that it holds and renews.

The lease is a small object, replaced only if it is still the one that was read (If-Match). No clock
of another machine is trusted: a job that finds a lease of a process on its own machine asks the
kernel whether that process lives, and for another machine's it watches whether the lease changes.
A job that was asleep so long that another took over learns it when it asks (`confirm`), or from its
next renewal.
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

from mdm.storage import LocalStore, MissingObjectError, Store, StoreError

LEASE = "work/lease.json"  # of an encoded data set
RENEW_SECONDS = 5.0
WATCH_SECONDS = 20.0
PATIENCE_SECONDS = 300.0  # for the end of an earlier attempt of the same job, or of a brief command
MISSES = 50  # of a lease that is there and is not, before it is told of
_EXITING = 0x4  # PF_EXITING of a process's flags


class OtherJobError(ValueError):
    """Another job writes to the same place; the message is one line for the user.

    `same_job` says that it is another attempt of this very job.
    """

    def __init__(self, message: str, *, same_job: bool = False) -> None:
        super().__init__(message)
        self.same_job = same_job


class Lease:
    """The right to write to a store, from `take` to `release`.

    Args:
        about: what this job is, for whoever finds it here: `recipe 1234`, `run /runs/a`.
        key: the object that is the lease.
        place: what the message calls the store; its URI if empty.
        advice: what else a second job could do than wait.
        job: equal for the attempts of one supervised job; empty where there is no supervisor.
        brief: others had better wait a moment than be refused.
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
        self._mine = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "ticks": _start_ticks(os.getpid()),
            "place": place_of(store),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),  # for people; nothing compares it
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
        """Take the lease; OtherJobError while another job lives that holds it."""
        end, missed = time.monotonic() + PATIENCE_SECONDS, 0
        while not self._store.put(self._key, self._bytes(), if_absent=True):
            try:
                data, etag = self._store.read(self._key)
            except MissingObjectError:  # given back meanwhile, or a link to nowhere
                missed += 1
                if missed > MISSES:
                    raise StoreError(
                        f"{self._place}/{self._key} can be neither read nor made: remove it"
                    ) from None
                time.sleep(0.1)
                continue
            there = _parsed(data)
            if there.get("token") == self._mine["token"]:
                break  # the answer to our own request was lost
            if self._lives(there, etag):
                same = self._same_job(there)
                if not (same or there.get("brief")) or time.monotonic() > end:
                    raise OtherJobError(
                        f"{self._place} is being written by another job ({_named(there)}): wait "
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
        """Ask the store; OtherJobError if another job has taken over, StoreError if it is away."""
        self.check()
        try:
            data, etag = self._store.read(self._key)
        except MissingObjectError:
            self._lose({})
        else:
            self._note_owner(data)
            if self._thread is None:
                self._etag = etag
        self.check()

    def release(self) -> None:
        """Give it back, unless another job has it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.confirm()
            self._store.delete(self._key)
        except OtherJobError:
            return
        except (StoreError, OSError) as error:
            # The next job finds this process dead.
            print(f"the lease stays behind: {error}", file=sys.stderr)  # noqa: T201

    def _bytes(self) -> bytes:
        return json.dumps(self._mine | {"renewals": self._renewals}).encode()

    def _same_job(self, there: dict[str, Any]) -> bool:
        return bool(self._mine["job"]) and there.get("job") == self._mine["job"]

    def _lives(self, there: dict[str, Any], etag: str) -> bool:
        here = there.get("machine") == self._mine["machine"]
        # A lease that was copied with its folder is not the one that its process renews.
        if here and there.get("place") == self._mine["place"]:
            running = _runs(there.get("pid"), there.get("ticks"))
            if running is not None:
                return running
        if not self._watched:
            self._watched = True
            print(  # noqa: T201
                f"another job ({_named(there)}) has written to {self._place}: watching for "
                f"{WATCH_SECONDS:.0f} s whether it still does",
                file=sys.stderr,
            )
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS / 5))
            try:
                if self._store.read(self._key)[1] != etag:
                    return True
            except MissingObjectError:
                return False
        return False

    def _note_owner(self, data: bytes) -> None:
        there = _parsed(data)
        if there.get("token") != self._mine["token"]:
            self._lose(there)

    def _lose(self, there: dict[str, Any]) -> None:
        who = _named(there) if there else f"it has finished, or {self._key} was deleted"
        self._lost = OtherJobError(
            f"{self._place} was taken over by another job ({who}) while this one did not answer: "
            "nothing is lost, let the other one finish",
            same_job=self._same_job(there),
        )

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(RENEW_SECONDS) and not self.lost:
            try:
                self._renew()
            except (StoreError, OSError):
                continue  # an outage: the job itself says so, and the lease is still ours

    def _renew(self) -> None:
        self._renewals += 1
        etag = self._store.replace(self._key, self._bytes(), self._etag)
        if etag is None:
            try:
                data, etag = self._store.read(self._key)
            except MissingObjectError:
                self._lose({})
                return
            self._note_owner(data)  # ours, if only the answer was lost
        self._etag = etag


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

    In it, where nothing may be written beside it, as with a volume of a container.
    """
    folder = folder.resolve()
    at = folder.parent
    if at.exists() and not os.access(at, os.W_OK):
        at = folder
    key = f".{folder.name}.lease.json"
    with hold(LocalStore(at), about, key=key, place=str(folder)) as lease:
        yield lease


def place_of(store: Store) -> str:
    """Equal for stores of one place, by whichever links their folder was named."""
    return str(store.root.resolve()) if isinstance(store, LocalStore) else store.uri


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _named(there: dict[str, Any]) -> str:
    """The owner of a lease, for people: one line, whatever the lease holds."""
    if "pid" not in there and "host" not in there:
        return "its lease is damaged and does not say which"
    since = f" since {there['since']}" if there.get("since") else ""
    about = f", {there['about']}" if there.get("about") else ""
    named = f"process {there.get('pid')} on {there.get('host')}{since}{about}"
    return "".join(c if c.isprintable() else "?" for c in named)


def _machine() -> str:
    """Equal for processes that see one another's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # no such thing here: none is known to be ours


def _stat(pid: int) -> list[str]:
    """The fields of a process behind its name, the first its state; OSError if it is not seen."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def _start_ticks(pid: int) -> int:
    """When a process began, in ticks since the machine did; -1 where no kernel says so."""
    try:
        return int(_stat(pid)[19])
    except (OSError, IndexError, ValueError):
        return -1


def _runs(pid: Any, ticks: Any) -> bool | None:
    """Whether this very process runs on this machine; None where that cannot be known.

    One that is being ended, or waits for its parent to take note of it, writes nothing any more.
    """
    if not isinstance(pid, int) or not isinstance(ticks, int) or pid < 1 or ticks < 0:
        return None
    try:
        fields = _stat(pid)
        dead = fields[0] in "ZX" or int(fields[6]) & _EXITING
        return not dead and int(fields[19]) == ticks
    except (OSError, IndexError, ValueError):
        # Gone, or hidden because it is another user's.
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):  # there are no such numbers
            return False
        except PermissionError:
            pass
        return None
