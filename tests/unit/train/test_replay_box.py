"""A replay box gives the loss that its step had, also one that an earlier version wrote."""

from pathlib import Path

import pytest
import torch

from mdm.checkpoint.state import RunError
from mdm.train import replay_box
from mdm.utils.ranks import World
from tests.helpers import MemoryLoader, SmallLoss, small_config
from tests.unit.test_packed_samples import objective, packed, rank_of


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """The box of step 7 of a run in `tmp_path`."""
    config = small_config(tmp_path, precision="fp32")
    batch = next(MemoryLoader(config, World()))
    torch.manual_seed(0)
    weights = SmallLoss(config).state_dict()
    return replay_box.write(tmp_path, config, 7, {"reason": "a spike"}, batch, weights)


def losses(box: Path) -> tuple[float, list[float]]:
    whole, played = replay_box.replay(box, SmallLoss)
    return whole, [sample.loss for sample in played]


def test_a_step_is_found_and_its_samples_average_to_its_loss(box, tmp_path):
    folder, report = replay_box.find_box(tmp_path, 7)
    assert folder == box == tmp_path / "replay_boxes" / "step-00000007"
    assert report["reason"] == "a spike"
    whole, samples = losses(box)
    assert len(samples) == 8
    assert sum(samples) / 8 == pytest.approx(whole, rel=1e-5)


def test_a_step_without_a_box_is_refused_with_those_that_have_one(box, tmp_path):
    with pytest.raises(RunError, match=r"step 8 has no replay box .*replay_boxes; there are: 7$"):
        replay_box.find_box(tmp_path, 8)


def test_a_box_of_an_earlier_version_is_replayed(box, tmp_path):
    expected = losses(box)
    batch = torch.load(box / "batch.pt", weights_only=True)
    batch["picture_at"] = batch.pop("image_at")
    torch.save(batch, box / "batch.pt")
    (tmp_path / "replay_boxes").rename(tmp_path / "blackbox")
    folder, _ = replay_box.find_box(tmp_path, 7)
    assert folder == tmp_path / "blackbox" / box.name
    assert losses(folder) == expected


@pytest.mark.parametrize("images", [0, 1])
def test_packed_samples_are_replayed_one_by_one(tmp_path: Path, images: int) -> None:
    batch, config = packed(images), small_config(tmp_path, precision="fp32")
    rows = len(batch.tokens)
    shares = [rank_of(batch, part, 2) for part in (slice(0, 1), slice(1, rows))]
    joined = replay_box.join(shares)
    for name, value in vars(joined).items():
        expected = getattr(batch, name)
        equal = torch.equal(value, expected) if torch.is_tensor(value) else value == expected
        assert equal, name
    weights = objective().state_dict()
    box = replay_box.write(tmp_path, config, 7, {"reason": "a spike"}, joined, weights)
    whole, played = replay_box.replay(box, lambda _: objective())
    assert [sample.id for sample in played] == list(batch.ids)
    assert sum(sample.loss for sample in played) / len(batch) == pytest.approx(whole, rel=1e-5)
