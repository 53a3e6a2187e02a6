import json

import pytest

from mdm.dist import World
from mdm.train import checkpoint
from mdm.train.checkpoint import MARKER, latest_valid, prune, set_aside, why_invalid


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def commit(run_dir, step: int) -> None:
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    work = final.with_name(final.name + ".tmp")
    (work / "main").mkdir(parents=True)
    (work / "main" / "shard").write_bytes(bytes([step]) * 100)
    (work / "state.json").write_text(json.dumps({"step": step}))
    checkpoint._commit(work, final, World())


def names(run_dir) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_newest_committed_is_found(group, tmp_path):
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    found, passed = latest_valid(tmp_path)
    assert found is not None
    assert (found.state.step, passed) == (2, [])


def test_nothing_to_find(tmp_path):
    assert latest_valid(tmp_path) == (None, [])


@pytest.mark.parametrize("name", ["main/shard", "state.json", "manifest.json", MARKER])
def test_every_file_is_covered(group, tmp_path, name):
    """A missing, longer or changed file of any kind invalidates the whole."""
    commit(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001"
    assert why_invalid(path) == ""
    original = (path / name).read_bytes()
    (path / name).write_bytes(original + b"x")
    assert why_invalid(path)
    (path / name).write_bytes(bytes([original[0] ^ 1]) + original[1:])
    assert why_invalid(path)
    (path / name).unlink()
    assert why_invalid(path)
    (path / name).write_bytes(original)
    assert why_invalid(path) == ""


def test_prune_keeps_the_newest_and_drops_leftovers(group, tmp_path):
    for step in (1, 2, 3):
        commit(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000004.tmp").mkdir()
    prune(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_set_aside_keeps_the_bytes_out_of_sight(group, tmp_path):
    commit(tmp_path, 1)
    set_aside(tmp_path / "checkpoints" / "step-00000001")
    commit(tmp_path, 1)
    set_aside(tmp_path / "checkpoints" / "step-00000001")
    assert names(tmp_path) == ["step-00000001.aside-0", "step-00000001.aside-1"]
    assert latest_valid(tmp_path) == (None, [])
