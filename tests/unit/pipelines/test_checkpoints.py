"""The command around checkpoints: what it prints, removes and refuses."""

import os
import sys

import pytest

from mdm.checkpoint.checkpoints import Checkpoints
from mdm.storage.lease import hold
from mdm.train.writer import RUN_LEASE
from pipelines import checkpoints as job
from tests.unit.checkpoint.test_checkpoints import commit


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def call(*args: str) -> tuple[int, str]:
        argv = ["checkpoints.py", args[0], "--at", str(tmp_path), *args[1:]]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            code = job.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def test_list_verify_prune_and_roll_back(tmp_path, run):
    checkpoints = Checkpoints.at(str(tmp_path))
    for step, loss in ((10, 1.5), (20, None), (30, 2.5)):
        commit(checkpoints, step, loss)
    checkpoints.claim(40)
    code, printed = run("list")
    lines = printed.splitlines()
    assert code == 0
    assert [line.split()[0][-2:] for line in lines] == ["40", "30", "20", "10"]
    assert "it was never committed" in lines[0]
    assert "loss 2.5000" in lines[1]
    assert "loss" not in lines[2]

    assert run("verify") == (0, "".join(f"step-000000{n}  valid\n" for n in (30, 20, 10)))
    (tmp_path / "step-00000020" / "rank-00000" / "weights.0000").write_bytes(b"short")
    code, printed = run("verify")
    assert code == 1
    assert "step-00000020/rank-00000/weights.0000 has 5 bytes instead of 100" in printed

    assert run("rollback", "--to", "10") == (
        0,
        "set aside step-00000030\nset aside step-00000020\n",
    )
    assert "set aside: rolled back to step 10" in run("list")[1]
    assert run("rollback", "--to", "20") == (
        2,
        "checkpoints: --to is 20; there are checkpoints of steps [10]\n",
    )
    assert run("prune", "--keep", "1") == (0, "")
    assert run("prune", "--asides")[1].count("removed") == 3
    assert list(checkpoints.contents()) == ["step-00000010"]


def test_mistakes_end_with_one_line(run):
    code, printed = run("trim")
    assert code == 2
    assert printed.splitlines()[-1] == (
        "checkpoints: the first argument is 'trim'; choose one of list, verify, prune, rollback"
    )
    code, printed = run("rollback")
    assert (code, printed.splitlines()[-1]) == (
        2,
        "checkpoints: rollback: --to is missing; give the step to go back to",
    )


def test_a_living_runs_checkpoints_are_listed_and_verified_and_not_changed(tmp_path, run):
    checkpoints = Checkpoints.at(str(tmp_path))
    for step in (10, 20, 30):
        commit(checkpoints, step)
    with hold(checkpoints.store, "run /runs/a", key=RUN_LEASE):
        for words in (("prune",), ("prune", "--asides"), ("rollback", "--to", "10")):
            code, printed = run(*words)
            assert code == 2
            assert printed.startswith(
                f"checkpoints: {tmp_path} is being written by another job (process {os.getpid()} "
            )
            assert "run /runs/a): wait for it, or stop it first" in printed
            assert printed.count("\n") == 1
        assert len(run("list")[1].splitlines()) == 3
        assert run("verify")[0] == 0
        assert run("prune", "--keep", "2", "--live") == (0, "removed step-00000010\n")
        assert run("prune", "--asides", "--live")[0] == 2
    assert run("rollback", "--to", "20") == (0, "set aside step-00000030\n")
    assert RUN_LEASE not in checkpoints.store.listing()
    assert run("prune", "--at", str(tmp_path / "nothing")) == (0, "")
    nothing = tmp_path / "nothing"
    assert run("list", "--at", str(nothing)) == (0, f"no checkpoints in {nothing}\n")
    assert run("verify", "--at", str(nothing)) == (1, f"no checkpoints in {nothing}\n")
    assert not nothing.exists()
