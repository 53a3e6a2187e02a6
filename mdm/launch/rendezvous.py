"""How the supervisors of several nodes agree on an attempt, by files in a folder that all see.

    node-NAME.json     a node's own: a counter that moves while it lives, what it waits for, address
    attempt.json       written by the leader: number, nodes in rank order, address, port
    strikes.json       failures that began on a node, by name

The leader is the first node of the hostfile that is alive. Nobody compares clocks: a node is alive
for as long as others see its counter move.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mdm.utils import files

_NODE: files.Shape = {"count": int, "state": str, "done": int, "address": str}
_ATTEMPT: files.Shape = {"number": int, "nodes": list, "address": str, "port": int}
BEAT = 0.5
LOST = 10.0  # seconds after which a node whose counter stands still is gone


@dataclass(frozen=True)
class Attempt:
    """One go at the job: which nodes, in rank order, and where they find each other."""

    number: int
    nodes: tuple[str, ...]
    address: str
    port: int
    rank: int = 0  # this node's
    hosts: dict[str, int] = field(default_factory=dict)  # slots by name; empty: this machine alone


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by node, in the file's order; ValueError names a line that cannot be meant."""
    hosts: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[-1].removeprefix("slots=")
        if len(words) != 2 or not words[1].startswith("slots=") or not slots.isdecimal():
            raise ValueError(f"{path}: {line!r} is not `name slots=N`")
        if words[0] in hosts or not int(slots):
            raise ValueError(f"{path}: {line!r}: a node has one line, and at least one slot")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ValueError(f"{path} names no node; a line is `name slots=N`")
    return hosts


class Rendezvous:
    """This node's seat: a thread keeps its counter moving."""

    def __init__(
        self,
        folder: Path,
        hosts: dict[str, int],
        own: str,
        least: int,
        patience: float,
        strikes: int,
        port: Callable[[], int],
    ) -> None:
        self.folder, self.hosts, self.own = folder, hosts, own
        self.least, self.patience, self.strikes, self._port = least, patience, strikes, port
        self._done = 0  # the last attempt that this node took part in
        self._state = "waiting"
        self._seen: dict[str, tuple[int, float]] = {}
        self._count = 0
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def alone(cls, port: Callable[[], int]) -> "Rendezvous":
        """A rendezvous of one node, which needs no folder."""
        return cls(Path(), {}, "", 1, 0.0, 0, port)

    def __enter__(self) -> "Rendezvous":
        if self.hosts:
            self.folder.mkdir(parents=True, exist_ok=True)
            # An attempt that was called before this supervisor began is not one to join.
            self._done = self._attempt().get("number", 0)
            self._write()
            self._thread = threading.Thread(target=self._beat, name="mdm-rendezvous", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._path(self.own).unlink(missing_ok=True)

    def _attempt(self) -> dict[str, Any]:
        """The last attempt that was called; empty if there is none, or none of these nodes."""
        found = files.read_json(self.folder / "attempt.json", _ATTEMPT)
        return found if all(name in self.hosts for name in found.get("nodes", ())) else {}

    def _strikes(self) -> dict[str, int]:
        found = files.read_json(self.folder / "strikes.json")
        return {name: n for name, n in found.items() if isinstance(n, int)}

    def _path(self, name: str) -> Path:
        return self.folder / f"node-{name}.json"

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self._write()

    def _write(self) -> None:
        with self._writing:
            self._count += 1
            note: dict[str, Any] = {"count": self._count, "state": self._state, "done": self._done}
            note["address"] = _address(self.own)
            files.write_json(self._path(self.own), note, sync=False)

    def alive(self) -> dict[str, dict[str, Any]]:
        """The notes of the nodes whose counters move, in the hostfile's order."""
        now, found = time.monotonic(), {}
        for name in self.hosts:
            note = files.read_json(self._path(name), _NODE)
            if not note:
                continue
            count, since = self._seen.get(name, (-1, now))
            if note["count"] != count:
                self._seen[name] = (note["count"], now)
                # One look cannot tell a living node from what a dead one left.
                moved = count >= 0 or name == self.own
                since = now if moved else now - LOST
                if not moved:
                    self._seen[name] = (note["count"], since)
            if now - since < LOST:
                found[name] = note
        return found

    def next_attempt(self, stop: Callable[[], bool]) -> Attempt | None:
        """Wait for the next attempt that this node is part of; None once `stop` says so."""
        if not self.hosts:
            self._done += 1
            return Attempt(self._done, (socket.gethostname(),), "127.0.0.1", self._port())
        self._state = "waiting"
        self._write()
        began = time.monotonic()
        while not stop():
            alive = self.alive()
            current = self._attempt()
            if current and current["number"] > self._done and self.own in current["nodes"]:
                self._state = "running"  # first: waiting with this number means that it is over
                self._done = current["number"]
                self._write()
                nodes = tuple(current["nodes"])
                return Attempt(
                    **{k: current[k] for k in _ATTEMPT if k != "nodes"},
                    nodes=nodes,
                    rank=nodes.index(self.own),
                    hosts={name: self.hosts[name] for name in nodes},
                )
            if alive and next(iter(alive)) == self.own:
                self._lead(alive, current, time.monotonic() - began)
            time.sleep(BEAT / 2)
        return None

    def _lead(self, alive: dict[str, Any], current: dict[str, Any], waited: float) -> None:
        """Call an attempt, if those who should be in it are there and idle."""
        if any(note["state"] != "waiting" for note in alive.values()):
            return
        strikes = self._strikes()
        fit = [name for name in alive if strikes.get(name, 0) < self.strikes]
        if len(fit) < self.least:  # too few are left to be choosy
            fit = list(alive)
        enough = len(fit) >= self.least and waited > self.patience
        barred = [n for n in self.hosts if strikes.get(n, 0) >= self.strikes and n not in fit]
        if not enough and len(fit) < len(self.hosts) - len(barred):
            return
        if len(fit) < self.least or self.own not in alive:
            return
        number = max([current.get("number", 0), *(note["done"] for note in alive.values())]) + 1
        attempt = Attempt(number, tuple(fit), alive[fit[0]]["address"], self._port())
        fields = asdict(attempt)
        # Not synced to the disk, like all of these files: none matters after a power cut.
        files.write_json(self.folder / "attempt.json", {k: fields[k] for k in _ATTEMPT}, sync=False)

    def broken(self, attempt: Attempt) -> str:
        """Which other node has left a running attempt, if one has; to be asked again and again."""
        if not self.hosts:
            return ""
        alive = self.alive()
        for name in attempt.nodes:
            note = alive.get(name)
            if note is None and name in self._seen:
                return f"node {name} is lost"
            if note and note["state"] == "waiting" and note["done"] >= attempt.number:
                return f"node {name} has ended the attempt"
        return ""

    def ended(self, attempt: Attempt, hurt: bool) -> None:
        """This node's part of the attempt is over; `hurt` if the failure began here."""
        if self.hosts and hurt:
            # Each node writes its own line at its own time: a lost strike costs one more restart.
            strikes = self._strikes()
            strikes[self.own] = strikes.get(self.own, 0) + 1
            files.write_json(self.folder / "strikes.json", strikes, sync=False)


def _address(name: str) -> str:
    """Where others reach this node: its name if it has an address, else the host's own."""
    for candidate in (name, socket.gethostname()):
        try:
            return str(socket.gethostbyname(candidate))
        except OSError:
            continue
    return "127.0.0.1"
