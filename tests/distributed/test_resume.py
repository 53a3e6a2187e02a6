"""Kill, tear and stop two real DeepSpeed ranks: what comes after is what would have come anyway."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdm.train import checkpoint
from mdm.train.export import export_checkpoint
from tests.helpers import run_ranks

pytestmark = pytest.mark.distributed
JOB = Path(__file__).with_name("train_job.py")


def train(run_dir: Path, ranks: int = 2, **options) -> tuple[int, str]:
    return run_ranks(JOB, ranks, str(run_dir), json.dumps(options))


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    """Losses, averaged weights, optimizer state and order of two finished runs, bit for bit."""
    assert losses(one) == losses(other)
    for folder in ("export", "snapshots/step-00000006"):
        a, b = weights(one / folder), weights(other / folder)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), folder
    digests = [json.loads((d / "done.json").read_text())["order_digest"] for d in (one, other)]
    assert digests[0] == digests[1]
    for shard in sorted((one / "checkpoints/step-00000012/main").glob("*_optim_states.pt")):
        mine, theirs = (
            torch.load(d / "checkpoints/step-00000012/main" / shard.name, weights_only=False)[
                "optimizer_state_dict"
            ]
            for d in (one, other)
        )
        for a, b in zip(mine["fp32_flat_groups"], theirs["fp32_flat_groups"], strict=True):
            assert torch.equal(a, b)
        a, b = (s["optimizer_state_dict"]["state"] for s in (mine, theirs))
        assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in ("exp_avg", "exp_avg_sq"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, output = train(run_dir)
    assert code == 0, output
    return run_dir


def test_undisturbed_run_is_complete(whole):
    assert [step for step, _, _ in losses(whole)] == list(range(1, 13))
    done = json.loads((whole / "done.json").read_text())
    assert done["step"] == 12
    assert done["samples_seen"] == 96
    assert done["attempts"] == 1
    assert 0 < done["time_to_first_batch"] < 120
    assert 0 < done["share_outside_model"] < 1
    assert losses(whole)[-3][1] < losses(whole)[0][1]


def test_killed_ranks_continue_bit_for_bit(whole, tmp_path):
    run_dir = tmp_path / "run"
    code, _ = train(run_dir, signal_step=8)
    assert code != 0
    assert [step for step, _, _ in losses(run_dir)] == list(range(1, 9))
    assert not (run_dir / "done.json").exists()
    code, output = train(run_dir)
    assert code == 0, output
    assert_same(whole, run_dir)
    done = json.loads((run_dir / "done.json").read_text())
    assert done["attempts"] == 2
    assert done["goodput"] < 1


def test_killed_in_the_middle_of_a_save(whole, tmp_path):
    run_dir = tmp_path / "run"
    code, _ = train(run_dir, tear_save="step-00000012")
    assert code != 0
    found, passed = checkpoint.latest_valid(run_dir)
    assert found is not None
    assert found.path.name == "step-00000006"
    assert passed == []  # what was being saved never got a checkpoint's name
    code, output = train(run_dir)
    assert code == 0, output
    assert_same(whole, run_dir)
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unmarked"])
def test_damaged_checkpoint_falls_back(whole, tmp_path, damage):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step-00000012"
    shard = next((newest / "ema").glob("*_optim_states.pt"))
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        (newest / checkpoint.MARKER).unlink()
    found, passed = checkpoint.latest_valid(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000006"
    assert len(passed) == 1
    words = {"truncated": "bytes instead of", "flipped": "has changed", "unmarked": "committed"}
    assert words[damage] in passed[0][1]


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "done.json").unlink()
    (run_dir / "checkpoints" / "step-00000012" / "manifest.json").write_text("{}")
    code, output = train(run_dir)
    assert code == 0, output
    assert "step-00000012: manifest.json is not the one" in output
    assert_same(whole, run_dir)


def test_sigterm_on_one_rank_saves_on_all(whole, tmp_path):
    run_dir = tmp_path / "run"
    # Rank 1 is told to stop before step 4's batch; both ranks save after that step.
    code, output = train(run_dir, signal_step=4, signal=int(signal.SIGTERM), signal_ranks=[1])
    assert code != 0
    assert "exitcode  : 75" in output
    found, _ = checkpoint.latest_valid(run_dir)
    assert found is not None
    assert found.state.step == 5
    code, output = train(run_dir)
    assert code == 0, output
    assert_same(whole, run_dir)


def test_changed_configuration_is_refused_in_one_line(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    code, output = train(tmp_path / "run", train={"lr": 0.5, "steps": 20})
    assert code != 0
    lines = [line for line in output.splitlines() if "train.lr was 0.01 and is 0.5" in line]
    assert len(lines) == 1
    assert "train.steps" not in lines[0]
    assert "Traceback (most recent call last)" not in output.split(lines[0])[0]


def test_other_world_size_is_refused_with_both_sizes(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    code, output = train(tmp_path / "run", ranks=1, train={"steps": 20})
    assert code != 0
    assert "was written by 2 ranks and this run has 1" in output


def test_nonfinite_loss_names_step_and_samples(tmp_path):
    code, output = train(tmp_path / "run", poison_step=3, train={"steps": 6})
    assert code != 0
    line = next(line for line in output.splitlines() if "is not finite" in line)
    assert "the loss of step 3 is not finite; rank 1: loss nan" in line
    assert "latents that are not finite of sample-25" in line  # of rank 1's 25, 27, 29, 31
    assert "sample-27" not in line
    assert "rank 0" not in line


def test_offline_export_equals_the_live_one(whole, tmp_path):
    export_checkpoint(whole / "checkpoints" / "step-00000012", tmp_path / "ema")
    offline, live = weights(tmp_path / "ema"), weights(whole / "export")
    assert offline.keys() == live.keys()
    assert all(torch.equal(offline[k], live[k]) for k in live)
    export_checkpoint(whole / "checkpoints" / "step-00000012", tmp_path / "raw", ema=False)
    raw = weights(tmp_path / "raw")
    assert not torch.equal(raw["text_out.weight"], live["text_out.weight"])


def test_retention_keeps_the_newest(tmp_path):
    options = {"steps": 6, "checkpoint_every": 2, "keep": 1, "snapshots": 0}
    code, output = train(tmp_path / "run", ranks=1, train=options)
    assert code == 0, output
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000006"]
