"""Nodes that come, go and fail, each a thread with a seat of its own in one folder."""

import threading
import time

import pytest

from mdm.launch import rendezvous as module
from mdm.launch.rendezvous import Rendezvous, read_hostfile

HOSTS = {"a": 2, "b": 2, "c": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "LOST", 3.0)


def seat(folder, name, least=2, patience=2.0, strikes=2) -> Rendezvous:
    return Rendezvous(folder, HOSTS, name, least, patience, strikes, lambda: 4242)


def gather(seats: list[Rendezvous], seconds: float = 60.0) -> list:
    """The attempt that each seat gets; None for one that gets none in time."""
    end = time.monotonic() + seconds
    found: list = [None] * len(seats)

    def wait(i: int) -> None:
        found[i] = seats[i].next_attempt(lambda: time.monotonic() > end)

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(seats))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


def test_all_nodes_meet_in_the_order_of_the_hostfile(tmp_path):
    with seat(tmp_path, "c", 3) as c, seat(tmp_path, "a", 3) as a, seat(tmp_path, "b", 3) as b:
        found = gather([c, a, b])
        assert [f.rank for f in found] == [2, 0, 1]
        assert {f.nodes for f in found} == {("a", "b", "c")}
        assert {(f.number, f.port) for f in found} == {(1, 4242)}
        assert [f.number for f in gather([a, b, c])] == [2, 2, 2]


def test_a_lost_node_is_left_out_and_comes_back(tmp_path):
    with seat(tmp_path, "a") as a, seat(tmp_path, "b") as b:
        with seat(tmp_path, "c") as c:
            assert gather([a, b, c])[0].nodes == ("a", "b", "c")
            c._closed.set()  # as SIGKILL would leave it: its note stays, its counter stands
            c._thread.join()
            assert {f.nodes for f in gather([a, b])} == {("a", "b")}
        with seat(tmp_path, "c") as again:
            assert {f.nodes for f in gather([a, b, again])} == {("a", "b", "c")}


def test_the_next_node_leads_when_the_first_is_gone(tmp_path):
    with seat(tmp_path, "b") as b, seat(tmp_path, "c") as c:
        found = gather([b, c])
        assert [f.nodes for f in found] == [("b", "c")] * 2
        assert [f.rank for f in found] == [0, 1]


def test_a_node_that_keeps_failing_is_left_out(tmp_path):
    with seat(tmp_path, "a") as a, seat(tmp_path, "b") as b, seat(tmp_path, "c") as c:
        for _ in range(2):
            found = gather([a, b, c])
            assert found[0].nodes == ("a", "b", "c")
            b.ended(found[1], hurt=True)
        first, second, left_out = gather([a, c, b], seconds=8.0)
        assert first.nodes == second.nodes == ("a", "c")
        assert left_out is None


def test_too_few_nodes_wait(tmp_path):
    with seat(tmp_path, "a") as a:
        assert gather([a], seconds=3.0) == [None]


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nn1 slots=8\n\nn2 slots=4 # slow\n")
    assert read_hostfile(path) == {"n1": 8, "n2": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1\n", "'n1' is not"),
        ("n1 slots=many\n", "'n1 slots=many' is not"),
        ("n1 slots=0\n", "at least one slot"),
        ("n1 slots=1\nn1 slots=2\n", "'n1 slots=2': a node has one line"),
        ("# nobody\n", "names no node"),
    ],
)
def test_a_hostfile_that_cannot_be_meant_is_refused(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(path)


@pytest.mark.parametrize(
    "data", [b"", bytes(64), b'{"number": 1', b"\xff", b"[1]", b"{}", b'{"number": "1"}']
)
def test_damaged_notes_are_passed_over(tmp_path, data):
    for name in ("attempt.json", "strikes.json", "node-a.json", "node-b.json"):
        (tmp_path / name).write_bytes(data)
    with Rendezvous(tmp_path, {"a": 1, "b": 1}, "a", 1, 0.0, 3, lambda: 29500) as rendezvous:
        attempt = rendezvous.next_attempt(lambda: False)
        assert attempt is not None
        assert attempt.nodes == ("a",)
        rendezvous.ended(attempt, hurt=True)
        assert rendezvous._strikes() == {"a": 1}
