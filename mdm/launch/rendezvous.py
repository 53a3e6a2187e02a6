"""How the supervisors of several nodes agree on an attempt, through files in a shared folder.

    node-NAME.json     written by each node: a counter that grows while it lives, its state, address
    attempt.json       written by the leader: number, nodes in rank order, address, port
    strikes.json       by node, the number of failures that began there

The leader is the first living node of the hostfile. No clocks are compared: a node lives as long as
the others see its counter grow. The files are not synced to the disk: none matters after a power
cut.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdm.utils import files

_NODE: files.Shape = {"count": int, "state": str, "done": int, "address": str}
_ATTEMPT: files.Shape = {"number": int, "nodes": list, "address": str, "port": int}
BEAT = 0.5  # seconds between two writes of a node's file
LOST = 10.0  # seconds after which a node whose counter stands still counts as lost


@dataclass(frozen=True)
class Attempt:
    """One attempt at the job: its nodes, in rank order, and where they connect."""

    number: int
    nodes: tuple[str, ...]
    address: str
    port: int
    rank: int = 0  # of this node
    hosts: dict[str, int] = field(default_factory=dict)  # slots by name; empty: this machine alone


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by node, in the file's order; raises ValueError that names an invalid line."""
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


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass
class Rendezvous:
    """One node's part in the rendezvous; a thread keeps its counter growing."""

    folder: Path = Path()  # shared by all nodes
    # Slots by node, in the hostfile's order; empty for a single node, which needs no folder.
    hosts: dict[str, int] = field(default_factory=dict)
    node: str = ""  # this one's name
    least: int = 1  # nodes that an attempt needs
    patience: float = 0.0  # seconds to wait for more nodes than that
    strikes: int = 0  # failures that began on a node before it is left out

    def __post_init__(self) -> None:
        self._done = 0  # the last attempt that this node took part in
        self._state = "waiting"
        self._seen: dict[str, tuple[int, float]] = {}  # by node: its counter, since when
        self._count = 0
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Rendezvous":
        if self.hosts:
            # This supervisor does not join an attempt that was called before it started.
            self._done = self._called().get("number", 0)
            self._write()
            self._thread = threading.Thread(target=self._beat, name="mdm-rendezvous", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._path(self.node).unlink(missing_ok=True)

    def _called(self) -> dict[str, Any]:
        """The last attempt that was called; empty if there is none, or none of these nodes."""
        attempt = files.read_json(self.folder / "attempt.json", _ATTEMPT)
        return attempt if all(name in self.hosts for name in attempt.get("nodes", ())) else {}

    def _strikes(self) -> dict[str, int]:
        strikes = files.read_json(self.folder / "strikes.json")
        return {name: n for name, n in strikes.items() if isinstance(n, int)}

    def _path(self, name: str) -> Path:
        return self.folder / f"node-{name}.json"

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self._write()

    def _write(self) -> None:
        with self._writing:
            self._count += 1
            values = (self._count, self._state, self._done, _address(self.node))
            note = dict(zip(_NODE, values, strict=True))
            files.write_json(self._path(self.node), note, sync=False)

    def alive(self) -> dict[str, dict[str, Any]]:
        """The files of the living nodes, in the hostfile's order."""
        now, notes = time.monotonic(), {}
        for name in self.hosts:
            if not (note := files.read_json(self._path(name), _NODE)):
                continue
            count, since = self._seen.get(name, (None, now - LOST))
            if note["count"] != count:
                # At first sight, a dead node's file looks like a living one's.
                since = now if count is not None or name == self.node else now - LOST
                self._seen[name] = (note["count"], since)
            if now - since < LOST:
                notes[name] = note
        return notes

    def next_attempt(self, stop: Callable[[], bool]) -> Attempt | None:
        """Wait for the next attempt that includes this node; None once `stop` returns True."""
        if not self.hosts:
            self._done += 1
            return Attempt(self._done, (socket.gethostname(),), "127.0.0.1", free_port())
        self._state = "waiting"
        self._write()
        began = time.monotonic()
        while not stop():
            alive, called = self.alive(), self._called()
            if called and called["number"] > self._done and self.node in called["nodes"]:
                # Before the number: a waiting node with this number has ended the attempt.
                self._state = "running"
                self._done = called["number"]
                self._write()
                nodes = tuple(called["nodes"])
                hosts = {name: self.hosts[name] for name in nodes}
                rank = nodes.index(self.node)
                return Attempt(self._done, nodes, called["address"], called["port"], rank, hosts)
            if alive and next(iter(alive)) == self.node:
                self._lead(alive, called, time.monotonic() - began)
            time.sleep(BEAT / 2)
        return None

    def _lead(self, alive: dict[str, Any], called: dict[str, Any], waited: float) -> None:
        """Call the next attempt, once the nodes that it should include are there and idle."""
        if any(note["state"] != "waiting" for note in alive.values()):
            return
        strikes = self._strikes()
        nodes = [name for name in alive if strikes.get(name, 0) < self.strikes]
        if len(nodes) < self.least:  # too few without those that have failed
            nodes = list(alive)
        left_out = [n for n in self.hosts if strikes.get(n, 0) >= self.strikes and n not in nodes]
        expected = self.least if waited > self.patience else len(self.hosts) - len(left_out)
        if len(nodes) < max(expected, self.least):
            return
        number = max([called.get("number", 0), *(note["done"] for note in alive.values())]) + 1
        values = (number, nodes, alive[nodes[0]]["address"], free_port())
        attempt = dict(zip(_ATTEMPT, values, strict=True))
        files.write_json(self.folder / "attempt.json", attempt, sync=False)

    def broken(self, attempt: Attempt) -> str:
        """Which other node has left a running attempt, if any; to be polled."""
        alive = self.alive()
        for name in attempt.nodes if self.hosts else ():
            note = alive.get(name)
            if note is None and name in self._seen:
                return f"node {name} is lost"
            if note and note["state"] == "waiting" and note["done"] >= attempt.number:
                return f"node {name} has ended the attempt"
        return ""

    def strike(self) -> None:
        """Record that a failure began on this node."""
        if self.hosts:
            # Nodes rarely write at the same moment, and a lost strike costs only one more restart.
            strikes = self._strikes()
            strikes[self.node] = strikes.get(self.node, 0) + 1
            files.write_json(self.folder / "strikes.json", strikes, sync=False)


def _address(name: str) -> str:
    """This node's address: that of its name if it has one, else the host's."""
    for candidate in (name, socket.gethostname()):
        try:
            return str(socket.gethostbyname(candidate))
        except OSError:
            continue
    return "127.0.0.1"
