"""NaN and spikes on real ranks: skipped, kept, rolled back, quarantined, replayed."""

import json
from pathlib import Path

import pytest
import torch

from mdm.checkpoint.checkpoints import Checkpoints
from mdm.train import replay_box as blackbox
from tests.distributed.test_resume import losses, train, weights
from tests.helpers import SmallLoss

pytestmark = pytest.mark.distributed
GUARD = {"window": 4, "skips": 1, "suspects": 0}


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def test_a_nan_sample_costs_one_step_and_is_named(tmp_path):
    """Rank 1's first sample of step 3 is NaN: skipped on all ranks, and nothing of it is left."""
    run_dir = tmp_path / "run"
    code, output = train(run_dir, poison_step=3)
    assert code == 0, output
    (event,) = events(run_dir, "skipped")
    assert event["step"] == 3
    assert "rank 1: latents that are not finite of sample-25" in event["reason"]
    assert "rank 0" not in event["reason"]
    newest = Checkpoints.at(str(run_dir / "checkpoints")).newest_first()[0][0]
    assert newest.state.guard["skipped"] == 1
    assert newest.manifest["loader"]["quarantined"] == ["sample-25"]
    assert all(torch.isfinite(w).all() for w in weights(run_dir / "export").values())
    box = blackbox.box_of(run_dir, 3)
    report = json.loads((box / "report.json").read_text())
    assert len(report["samples"]) == 8
    assert {"id", "noise_key", "epoch"} == set(report["samples"][0])
    whole, played = blackbox.replay(box, SmallLoss)
    assert not torch.isfinite(torch.tensor(whole))
    assert [p.id for p in played if not p.finite] == ["sample-25"]
    assert "not finite alone: sample-25" in blackbox.describe(report, whole, played)


def test_spikes_roll_back_and_quarantine_the_same_with_and_without_a_kill(tmp_path):
    """Two poisoned samples: two steps skipped, back to the checkpoint, their samples replaced."""
    poison = {"sample-17": 1e4, "sample-30": 1e4}  # of steps 6 and 7, on rank 1 and rank 0
    options = {
        "poison": poison,
        "poison_from": 6,  # the guard knows what is usual by then
        "guard": GUARD,
        "train": {"steps": 14, "checkpoint_every": 5, "snapshots": 0},
    }
    # Tokens alone in every third step: steps 6 and 7 have pictures.
    whole = tmp_path / "whole"
    code, output = train(whole, **options)
    assert code == 0, output
    (back,) = events(whole, "rolled back")
    assert back["step"] == 5
    assert set(poison) <= set(back["quarantined"])
    assert len(back["quarantined"]) == 16
    assert [step for step, *_ in losses(whole)] == list(range(1, 15))
    report = json.loads((blackbox.box_of(whole, 6) / "report.json").read_text())
    now, played = blackbox.replay(blackbox.box_of(whole, 6), SmallLoss)
    assert now == pytest.approx(report["loss"], rel=1e-2)
    assert blackbox.blame(played)[0][0].id == "sample-17"

    killed = tmp_path / "killed"  # after the rollback, before the next checkpoint
    code, _ = train(killed, signal_step=9, once=str(tmp_path / "once"), **options)
    assert code != 0
    code, output = train(killed, **options)
    assert code == 0, output
    assert losses(killed) == losses(whole)
    a, b = weights(whole / "export"), weights(killed / "export")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_trouble_without_an_end_gives_up_in_one_line(tmp_path):
    """From step 8 on every picture is a spike, whatever the samples: going back does not help."""
    options = {
        "guard": GUARD | {"rollbacks": 1, "black_boxes": 0},
        "train": {"steps": 40, "checkpoint_every": 5, "snapshots": 0},
        "explode_from": 8,
    }
    code, output = train(tmp_path / "run", ranks=1, **options)
    assert code != 0
    assert "no way past steps 9 to 10 (2 of them skipped)" in output
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]
    assert len(events(tmp_path / "run", "rolled back")) == 1
