"""Nodes that come, go and fail: each is a thread with its own rendezvous in one folder."""

import threading
import time

import pytest

from mdm.launch import rendezvous
from mdm.launch.rendezvous import Rendezvous, read_hostfile

HOSTS = {"a": 2, "b": 2, "c": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rendezvous, "BEAT", 0.05)
    monkeypatch.setattr(rendezvous, "LOST", 3.0)
    monkeypatch.setattr(rendezvous, "free_port", lambda: 4242)


def node(folder, name, least=2, patience=2.0, strikes=2) -> Rendezvous:
    return Rendezvous(folder, HOSTS, name, least, patience, strikes)


def next_attempts(nodes: list[Rendezvous], seconds: float = 60.0) -> list:
    """The next attempt of each node; None for a node without one in time."""
    end = time.monotonic() + seconds
    attempts: list = [None] * len(nodes)

    def wait(i: int) -> None:
        attempts[i] = nodes[i].next_attempt(lambda: time.monotonic() > end)

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(nodes))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return attempts


def test_all_nodes_join_in_the_order_of_the_hostfile(tmp_path):
    with node(tmp_path, "c", 3) as c, node(tmp_path, "a", 3) as a, node(tmp_path, "b", 3) as b:
        attempts = next_attempts([c, a, b])
        assert [f.rank for f in attempts] == [2, 0, 1]
        assert {f.nodes for f in attempts} == {("a", "b", "c")}
        assert {(f.number, f.port) for f in attempts} == {(1, 4242)}
        assert [f.number for f in next_attempts([a, b, c])] == [2, 2, 2]


def test_a_lost_node_is_left_out_and_comes_back(tmp_path):
    with node(tmp_path, "a") as a, node(tmp_path, "b") as b:
        with node(tmp_path, "c") as c:
            assert next_attempts([a, b, c])[0].nodes == ("a", "b", "c")
            c._closed.set()  # as after SIGKILL: its file stays, its counter stands still
            c._thread.join()
            assert {f.nodes for f in next_attempts([a, b])} == {("a", "b")}
        with node(tmp_path, "c") as again:
            assert {f.nodes for f in next_attempts([a, b, again])} == {("a", "b", "c")}


def test_the_next_node_leads_when_the_first_is_gone(tmp_path):
    with node(tmp_path, "b") as b, node(tmp_path, "c") as c:
        attempts = next_attempts([b, c])
        assert [f.nodes for f in attempts] == [("b", "c")] * 2
        assert [f.rank for f in attempts] == [0, 1]


def test_a_node_that_keeps_failing_is_left_out(tmp_path):
    with node(tmp_path, "a") as a, node(tmp_path, "b") as b, node(tmp_path, "c") as c:
        for _ in range(2):
            attempts = next_attempts([a, b, c])
            assert attempts[0].nodes == ("a", "b", "c")
            b.strike()
        first, second, left_out = next_attempts([a, c, b], seconds=8.0)
        assert first.nodes == second.nodes == ("a", "c")
        assert left_out is None


def test_too_few_nodes_wait(tmp_path):
    with node(tmp_path, "a") as a:
        assert next_attempts([a], seconds=3.0) == [None]


def test_a_hostfile_names_nodes_and_slots(tmp_path):
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
def test_an_invalid_hostfile_is_refused(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(path)


@pytest.mark.parametrize(
    "data", [b"", bytes(64), b'{"number": 1', b"\xff", b"[1]", b"{}", b'{"number": "1"}']
)
def test_damaged_files_are_ignored(tmp_path, data):
    for name in ("attempt.json", "strikes.json", "node-a.json", "node-b.json"):
        (tmp_path / name).write_bytes(data)
    with Rendezvous(tmp_path, {"a": 1, "b": 1}, "a", 1, 0.0, 3) as alone:
        attempt = alone.next_attempt(lambda: False)
        assert attempt is not None
        assert attempt.nodes == ("a",)
        alone.strike()
        assert alone._strikes() == {"a": 1}
