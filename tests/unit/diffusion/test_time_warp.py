"""Noise levels are drawn where the learned loss curve changes."""

import torch

from mdm.diffusion.schedule import STEPS
from mdm.diffusion.time_warp import TimeWarp

UNIFORMS = torch.rand(20_000, generator=torch.Generator().manual_seed(0))


def learned() -> TimeWarp:
    warp = TimeWarp(100)
    t = torch.arange(1, STEPS)
    for _ in range(200):
        warp.update(t, 4.6 * torch.sigmoid((t - 500) / 20))
    return warp


def test_levels_are_uniform_until_losses_are_seen():
    t = TimeWarp(100).steps(UNIFORMS)
    assert (t.min(), t.max()) == (1, STEPS - 1)
    shares = torch.bincount((t - 1) * 10 // (STEPS - 1), minlength=10) / len(t)
    assert (shares - 0.1).abs().max() < 0.02


def test_levels_concentrate_where_the_loss_changes():
    t = learned().steps(UNIFORMS)
    assert (t.min(), t.max()) == (1, STEPS - 1)
    assert ((t > 400) & (t < 600)).float().mean() > 0.7
    assert (t < 300).float().mean() > 0.04  # every level is still drawn


def test_levels_increase_with_their_uniforms():
    t = learned().steps(UNIFORMS.sort().values)
    assert (t.diff() >= 0).all()


def test_clean_and_dropped_tokens_are_ignored():
    warp = TimeWarp(100)
    before = warp.loss.clone()
    warp.update(torch.tensor([0, STEPS]), torch.tensor([100.0, 100.0]))
    assert torch.equal(warp.loss, before)


def test_the_learned_curve_is_saved_in_the_state_dict():
    warp, other = learned(), TimeWarp(100)
    other.load_state_dict(warp.state_dict())
    assert torch.equal(warp.steps(UNIFORMS), other.steps(UNIFORMS))
