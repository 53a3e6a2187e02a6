"""Noise schedules and counter-based noise."""

import pytest
import torch

from mdm.diffusion import noise, schedule


@pytest.mark.parametrize("table", [schedule.IMAGE, schedule.TEXT])
def test_tables_fall_from_data_to_noise_in_float64(table):
    abar = table.alphas_cumprod
    assert abar.dtype == torch.float64
    assert abar[0] == 1
    assert abar[-1] == 0
    assert (abar.diff() < 0).all()


def test_log_snr_inverts_alpha_bar():
    t = torch.arange(1, schedule.STEPS)
    for table in (schedule.IMAGE, schedule.TEXT):
        torch.testing.assert_close(table.log_snr(t).sigmoid(), table.alpha_bar(t))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    keys, epochs = torch.tensor([7, 8, 9]), torch.tensor([0, 0, 3])
    together = noise.draw(1, keys, epochs, 4, 6, 16)
    alone = noise.draw(1, keys[2:], epochs[2:], 4, 6, 16)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[2:], b)


def test_noise_depends_only_on_seed_key_and_epoch():
    def first(seed, key, epoch, n_text=6):
        return noise.draw(seed, torch.tensor([key]), torch.tensor([epoch]), 4, n_text, 16)

    base = first(1, 7, 0)
    for other in (first(2, 7, 0), first(1, 8, 0), first(1, 7, 1)):
        assert all(not torch.equal(a, b) for a, b in zip(base, other, strict=True))
    assert torch.equal(base.image, first(1, 7, 0, n_text=9).image)
    draws = noise.draw(0, torch.arange(500), torch.zeros(500).long(), 4, 4, 16)
    assert abs(draws.image.mean()) < 0.02
    assert abs(draws.image.std() - 1) < 0.02
    assert abs(draws.uniforms.mean() - 0.5) < 0.02
