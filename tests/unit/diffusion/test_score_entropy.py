"""The identities that make Eq. 4 a training objective."""

import pytest
import torch
from torch.autograd import grad

from mdm.diffusion.score_entropy import (
    energy,
    log_ratio,
    log_ratio_vocabulary,
    log_score_ratio,
    score_entropy,
)


def test_log_ratio_equals_eq_5():
    torch.manual_seed(0)
    z_t, y = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 7, 16, dtype=torch.float64)
    abar = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    a = abar[:, None, None]
    expected = z_t.square().sum(-1, keepdim=True) / 2 - (
        (z_t.unsqueeze(1) - a.sqrt() * y).square().sum(-1) / (2 * (1 - abar[:, None]))
    )
    torch.testing.assert_close(log_ratio(z_t, y, abar), expected.float(), rtol=1e-4, atol=1e-4)


def test_energy_equals_eq_17_with_a_residual():
    torch.manual_seed(0)
    z_0, eps, y = torch.randn(3, 16), torch.randn(3, 16), torch.randn(3, 7, 16)
    y[:, 2] = z_0
    abar = torch.tensor([0.1, 0.5, 0.9])
    a = abar[:, None]
    z_t = a.sqrt() * z_0 + (1 - a).sqrt() * eps
    energies = energy(z_t, y, abar, eps)  # the true residual explains the true candidate exactly
    torch.testing.assert_close(energies[:, 2], z_t.square().sum(1) / 2)
    assert (energies.argmax(1) == 2).all()
    eps_y = (z_t.unsqueeze(1) - a[..., None].sqrt() * y) / (1 - a[..., None]).sqrt()
    expected = energies[:, 2:3] - (eps_y - eps.unsqueeze(1)).square().sum(-1) / 2
    torch.testing.assert_close(energies, expected, rtol=1e-5, atol=1e-4)


def test_score_entropy_is_zero_at_the_target_and_positive_elsewhere():
    torch.manual_seed(0)
    log_r = torch.randn(4, 9).log_softmax(-1)
    torch.testing.assert_close(score_entropy(log_r, log_r), torch.zeros(4), atol=1e-6, rtol=0)
    assert (score_entropy(torch.randn(4, 9).log_softmax(-1), log_r) > 1e-3).all()


def test_score_entropy_of_normalised_ratios_equals_kl():
    torch.manual_seed(0)
    log_s, log_r = torch.randn(5, 8).log_softmax(-1), torch.randn(5, 8).log_softmax(-1)
    kl = (log_r.exp() * (log_r - log_s)).sum(-1)
    torch.testing.assert_close(score_entropy(log_s, log_r), kl, rtol=1e-5, atol=1e-6)


def test_score_entropy_of_a_one_hot_target_equals_cross_entropy():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 11), torch.arange(6)
    one_hot = torch.full((6, 11), -torch.inf)
    one_hot[torch.arange(6), target] = 0
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(score_entropy(log_score_ratio(logits), one_hot), expected)


@pytest.mark.parametrize("alpha_bar", [0.1, 0.6, 0.95])
def test_gradient_over_dense_candidates_equals_that_of_noise_prediction(alpha_bar):
    # With candidates that fill the line, cross-entropy over energies has the same gradient in
    # eps_hat as 1/2 |eps - eps_hat|^2.
    abar = torch.tensor([alpha_bar])
    z_0, eps = torch.tensor([[0.3]]), torch.tensor([[-0.7]])
    z_t = abar.sqrt() * z_0 + (1 - abar).sqrt() * eps
    reach = 9 * ((1 - abar) / abar).sqrt()  # nine standard deviations of the energies' Gaussian
    y = z_0 + torch.arange(-500, 501).view(1, -1, 1) / 500 * reach
    eps_hat = torch.tensor([[0.2]], requires_grad=True)
    log_s = log_score_ratio(energy(z_t, y, abar, eps_hat))
    (g_se,) = grad(-log_s[0, 500], eps_hat)
    (g_mse,) = grad(0.5 * (eps - eps_hat).square().sum(), eps_hat)
    torch.testing.assert_close(g_se, g_mse, rtol=0, atol=1e-6)


def test_ratios_over_a_shared_vocabulary_equal_those_over_candidates():
    torch.manual_seed(0)
    z_t, y = torch.randn(3, 5, 16), torch.randn(9, 16)
    abar = torch.rand(3, 5) * 0.9
    expected = log_ratio(z_t, y.expand(3, 5, 9, 16), abar)
    torch.testing.assert_close(log_ratio_vocabulary(z_t, y, abar), expected, rtol=1e-4, atol=1e-4)


def test_log_scores_of_almost_clean_data_are_finite():
    z_0 = torch.randn(2, 16)
    abar = torch.full((2,), 1 - 1e-6)
    y = torch.randn(2, 40, 16)
    y[:, 0] = z_0
    z_t = abar.sqrt()[:, None] * z_0 + (1 - abar).sqrt()[:, None] * torch.randn(2, 16)
    log_s = log_score_ratio(log_ratio(z_t, y, abar))
    assert torch.isfinite(log_s[:, 0]).all()
    assert (log_s[:, 0] > -1e-3).all()


def test_errors_name_both_values():
    z_t, y = torch.zeros(2, 4), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"alpha_bar spans 0\.5 to 1"):
        log_ratio(z_t, y, torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"candidates have shape \(2, 3, 5\)"):
        log_ratio(z_t, torch.zeros(2, 3, 5), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"alpha_bar is \(3,\).*needs \(2,\)"):
        log_ratio(z_t, y, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"alpha_bar is \(2,\).*needs \(2, 3\)"):
        log_ratio(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5, 4), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"candidates is \(3,\)"):
        log_ratio(z_t, torch.zeros(3, 3, 4), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"log_s has shape \(2, 3\), log_r \(2, 4\)"):
        score_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="eps_hat has shape"):
        energy(z_t, y, torch.full((2,), 0.5), torch.zeros(4))
