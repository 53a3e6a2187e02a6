"""NaN and spikes on real ranks: skipped steps, replay boxes, rollbacks and the blocklist."""

import json
from pathlib import Path

import pytest
import torch

from mdm.checkpoint.checkpoints import Checkpoints
from mdm.train import replay_box
from tests.distributed.test_resume import losses, run_training, weights
from tests.helpers import SmallLoss

pytestmark = pytest.mark.distributed
GUARD = {"window": 4, "skips": 1, "suspects": 0}


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def test_a_nan_sample_skips_one_step_and_joins_the_blocklist(tmp_path):
    """Rank 1's first sample of step 3 is NaN: all ranks skip the step; no weight changes."""
    run_dir = tmp_path / "run"
    code, output = run_training(run_dir, poison_step=3)
    assert code == 0, output
    (event,) = events(run_dir, "skipped")
    assert event["step"] == 3
    assert "rank 1: latents that are not finite of sample-25" in event["reason"]
    assert "rank 0" not in event["reason"]
    newest = Checkpoints.at(str(run_dir / "checkpoints")).newest_first()[0][0]
    assert newest.state.guard["skipped"] == 1
    assert newest.manifest["loader"]["quarantined"] == ["sample-25"]
    assert all(torch.isfinite(w).all() for w in weights(run_dir / "export").values())
    box = replay_box.box_of(run_dir, 3)
    report = json.loads((box / "report.json").read_text())
    assert len(report["samples"]) == 8
    assert {"id", "noise_key", "epoch"} == set(report["samples"][0])
    batch_loss, played = replay_box.replay(box, SmallLoss)
    assert not torch.isfinite(torch.tensor(batch_loss))
    assert [p.id for p in played if not p.finite] == ["sample-25"]
    assert "not finite alone: sample-25" in replay_box.describe(report, batch_loss, played)


def test_spikes_roll_back_and_extend_the_blocklist_with_and_without_a_kill(tmp_path):
    """Two poisoned samples: two skipped steps, a rollback, and other samples in their place."""
    poison = {"sample-17": 1e4, "sample-30": 1e4}  # of steps 6 and 7, on rank 1 and rank 0
    options = {
        "poison": poison,
        "poison_from": 6,  # by then, the guard has its statistics
        "guard": GUARD,
        "train": {"steps": 14, "checkpoint_every": 5, "snapshots": 0},
    }
    # Every third step is text-only; steps 6 and 7 have images.
    undisturbed = tmp_path / "whole"
    code, output = run_training(undisturbed, **options)
    assert code == 0, output
    (rollback,) = events(undisturbed, "rolled back")
    assert rollback["step"] == 5
    assert set(poison) <= set(rollback["blocklisted"])
    assert len(rollback["blocklisted"]) == 16
    assert [step for step, *_ in losses(undisturbed)] == list(range(1, 15))
    report = json.loads((replay_box.box_of(undisturbed, 6) / "report.json").read_text())
    replayed_loss, played = replay_box.replay(replay_box.box_of(undisturbed, 6), SmallLoss)
    assert replayed_loss == pytest.approx(report["loss"], rel=1e-2)
    assert replay_box.blame(played)[0][0].id == "sample-17"

    killed = tmp_path / "killed"  # killed after the rollback, before the next checkpoint
    code, _ = run_training(killed, signal_step=9, once=str(tmp_path / "once"), **options)
    assert code != 0
    code, output = run_training(killed, **options)
    assert code == 0, output
    assert losses(killed) == losses(undisturbed)
    a, b = weights(undisturbed / "export"), weights(killed / "export")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_endless_spikes_end_the_run_with_one_line(tmp_path):
    """From step 8 on, every image is a spike, whatever the sample: a rollback does not help."""
    options = {
        "guard": GUARD | {"rollbacks": 1, "replay_boxes": 0},
        "train": {"steps": 40, "checkpoint_every": 5, "snapshots": 0},
        "explode_from": 8,
    }
    code, output = run_training(tmp_path / "run", ranks=1, **options)
    assert code != 0
    assert "no way past steps 9 to 10 (2 of them skipped)" in output
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]
    assert len(events(tmp_path / "run", "rolled back")) == 1
