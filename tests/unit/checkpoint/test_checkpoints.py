import hashlib
import json

import pytest

from mdm.checkpoint.checkpoints import ASIDE, MARKER, Checkpoints, Keep, kept_of
from mdm.checkpoint.snapshot import DamagedError, entry_of
from mdm.checkpoint.state import RunError
from mdm.storage import open_store
from mdm.storage.lease import Lease, OtherJobError


def commit(checkpoints: Checkpoints, step: int, loss: float | None = None) -> str:
    name = checkpoints.claim(step)
    key, data = f"{name}/rank-00000/weights.0000", bytes([step % 256]) * 100
    checkpoints.store.put(key, data)
    state = {"step": step, "loss": loss}
    files = {key: entry_of(data)}
    checkpoints.commit(name, {"world_size": 1, "state": state, "files": files})
    return name


@pytest.fixture
def checkpoints(uri) -> Checkpoints:
    """Checkpoints in a folder, then on a real S3 server."""
    return Checkpoints.at(uri)


def test_committed_checkpoints_are_listed_newest_first(checkpoints):
    assert checkpoints.newest_first() == ([], [])
    commit(checkpoints, 1)
    commit(checkpoints, 2)
    checkpoints.claim(3)
    records, skipped = checkpoints.newest_first()
    assert [record.step for record in records] == [2, 1]
    assert records[0].state.step == 2
    assert skipped == [("step-00000003", "it was never committed")]


def test_a_checkpoint_is_invalid_if_any_object_is_damaged_or_missing(checkpoints):
    name = commit(checkpoints, 1)
    store = checkpoints.store
    assert checkpoints.why_invalid(name) == ""
    for part in ("rank-00000/weights.0000", "manifest.json", MARKER):
        key = f"{name}/{part}"
        original = store.get(key)
        for damaged in (original + b"x", bytes([original[0] ^ 1]) + original[1:], None):
            store.delete(key)
            if damaged is not None:
                store.put(key, damaged)
            assert checkpoints.why_invalid(name)
        store.put(key, original)
        assert checkpoints.why_invalid(name) == ""


def test_a_name_is_never_written_twice(checkpoints):
    assert checkpoints.claim(7) == "step-00000007"
    assert checkpoints.claim(7) == "step-00000007.1"
    assert commit(checkpoints, 7) == "step-00000007.2"
    assert list(checkpoints.contents()) == ["step-00000007.2", "step-00000007.1", "step-00000007"]
    assert checkpoints.prune(Keep(1)) == ["step-00000007.1", "step-00000007"]


def test_prune_keeps_the_newest_every_nth_and_the_best(checkpoints):
    for step, loss in ((10, 3.0), (20, 1.0), (25, 4.0), (30, 2.0), (40, 2.0)):
        commit(checkpoints, step, loss)
    checkpoints.claim(45)
    records, _ = checkpoints.newest_first()
    assert kept_of(records, Keep(1, every=15)) == {"step-00000040", "step-00000030"}
    assert kept_of(records, Keep(0, best=True)) == {"step-00000040", "step-00000020"}
    removed = checkpoints.prune(Keep(1, every=20, best=True))
    assert sorted(removed) == [f"step-000000{n}" for n in (10, 25, 30)]
    # An uncommitted checkpoint newer than all committed ones may still be being written.
    assert list(checkpoints.contents()) == [f"step-000000{n}" for n in (45, 40, 20)]
    assert not checkpoints.store.listing("step-00000010")


def test_a_checkpoint_set_aside_is_not_used_but_stays(checkpoints):
    name = commit(checkpoints, 1)
    checkpoints.set_all_aside("to be inspected")
    assert checkpoints.newest_first() == ([], [])
    assert checkpoints.why_invalid(name) == ""
    assert commit(checkpoints, 1) == "step-00000001.1"
    assert checkpoints.prune(Keep(1)) == []
    assert checkpoints.prune(Keep(1), asides=True) == [name]


def test_a_torn_manifest_is_set_aside_at_once(tmp_path):
    checkpoints = Checkpoints(open_store(str(tmp_path)))
    name = commit(checkpoints, 1)
    (tmp_path / name / "manifest.json").write_text("{}")
    records, skipped = checkpoints.newest_first()
    assert records == []
    assert skipped == [(name, "manifest.json is not the one that was committed")]
    assert (tmp_path / name / ASIDE).exists()
    assert checkpoints.newest_first() == ([], [])


def test_another_format_is_refused_with_both_versions(tmp_path):
    """The first format had no number in its manifest."""
    checkpoints, folder = Checkpoints(open_store(str(tmp_path))), tmp_path / "step-00000005"
    folder.mkdir()
    for number in (None, 3):
        manifest = {"files": {}} | ({"format": number} if number else {})
        data = json.dumps(manifest).encode()
        (folder / "manifest.json").write_bytes(data)
        (folder / MARKER).write_text(hashlib.sha256(data).hexdigest())
        words = rf"step-00000005 has checkpoint format {number or 1}, this version reads format 2"
        with pytest.raises(RunError, match=words):
            checkpoints.newest_first()
    checkpoints.set_all_aside("started over")
    assert checkpoints.newest_first() == ([], [])


def test_an_uncommitted_checkpoint_cannot_be_read(checkpoints):
    name = checkpoints.claim(1)
    with pytest.raises(DamagedError, match="never committed"):
        checkpoints.read(name)


def test_a_job_that_lost_its_lease_changes_nothing(uri):
    store = open_store(uri)
    lease = Lease(store, "run", key="lease.json")
    lease.take()
    lease._stop.set()  # as if the process had been stopped with all its threads
    checkpoints = Checkpoints(store, lease.confirm)
    for step in (10, 20, 30):
        commit(checkpoints, step)
    name = checkpoints.claim(40)
    store.put("lease.json", b'{"token": "another"}')
    before = store.listing()
    for change in (
        lambda: checkpoints.claim(50),
        lambda: checkpoints.commit(name, {}),
        lambda: checkpoints.set_aside("step-00000030", "damaged"),
        lambda: checkpoints.set_all_aside("anew"),
        lambda: checkpoints.remove("step-00000010"),
        lambda: checkpoints.prune(Keep(1)),
        checkpoints.sweep,
    ):
        with pytest.raises(OtherJobError, match="taken over"):
            change()
    assert store.listing() == before
