"""Each term of the image loss is least at E[eps | z_t], which is known for these data sets."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mdm.config import ObjectiveConfig
from mdm.diffusion import schedule
from mdm.loss import Loss, NoisyImage
from mdm.model.inputs import ImageInput
from tests.golden.test_losses import CONFIG

SAMPLES, TOKENS, WIDTH = 500, 4, 16
SCALES = torch.arange(0.88, 1.1201, 0.01)
STEPS = (20, 100, 250, 400, 500, 700, 900)


def gaussian(generator: torch.Generator) -> Tensor:
    return torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator)


def two_points(generator: torch.Generator) -> Tensor:
    return torch.randint(2, (SAMPLES, TOKENS, WIDTH), generator=generator) * 2.0 - 1


def exact_gaussian(z_t: Tensor, abar: Tensor) -> Tensor:
    return (1 - abar).sqrt() * z_t


def exact_two_points(z_t: Tensor, abar: Tensor) -> Tensor:
    z_0 = torch.tanh(abar.sqrt() * z_t / (1 - abar))
    return (z_t - abar.sqrt() * z_0) / (1 - abar).sqrt()


def best_scales(
    objective: ObjectiveConfig,
    draw: Callable[[torch.Generator], Tensor],
    exact: Callable[[Tensor, Tensor], Tensor],
    step: int,
) -> tuple[float, float, float]:
    """The multiples of the exact prediction at which noise term, score entropy and sum are least.

    They are relative to the least-squares multiple of this sample: its chance is not a bias.
    """
    loss = Loss(dataclasses.replace(CONFIG, objective=objective))
    generator = torch.Generator().manual_seed(step)
    z_0 = draw(generator)
    eps = torch.randn(z_0.shape, generator=generator)
    t = torch.full((SAMPLES, 1), step)
    abar = schedule.IMAGE.alpha_bar(t)
    a = abar[0, 0]
    z_t = schedule.noised(z_0, eps, a)
    eps_hat = exact(z_t, a)
    least_squares = float((eps * eps_hat).sum() / eps_hat.square().sum())
    zero = torch.zeros(())
    image = NoisyImage(ImageInput(z_t, torch.zeros_like(abar)), z_0, eps, abar, zero, zero)
    terms = []
    for scale in SCALES:
        v = (scale * eps_hat - (1 - a).sqrt() * z_t) / a.sqrt()
        eps_img, se_img = (term.mean() for term in loss.image_loss(v, image, t))
        terms.append(torch.stack([eps_img, se_img, eps_img + objective.se_image * se_img]))
    least = SCALES[torch.stack(terms).argmin(0)] / least_squares
    return tuple(least.tolist())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("draw", "exact"), [(gaussian, exact_gaussian), (two_points, exact_two_points)]
)
def test_every_image_term_is_least_at_the_exact_prediction(draw, exact, step):
    objective = ObjectiveConfig(se_image=1.0, image_candidates="noises")
    assert best_scales(objective, draw, exact, step) == pytest.approx((1, 1, 1), abs=0.03)


@pytest.mark.parametrize("step", [100, 250, 400])
def test_candidates_among_latents_bias_the_prediction(step):
    objective = ObjectiveConfig(se_image=0.1, image_candidates="latents")
    noise_term, score_entropy, total = best_scales(objective, gaussian, exact_gaussian, step)
    assert noise_term == pytest.approx(1, abs=0.03)
    assert abs(score_entropy - 1) > 0.08
    assert abs(total - 1) > 0.04


@pytest.mark.parametrize("step", [1, 300, 700, 950, 999])
@pytest.mark.parametrize("weight", ["v", "min_snr", "v_capped"])
def test_the_noise_term_is_the_v_error_up_to_the_purest_noise(weight, step):
    """Where abar is small a condition decides what is drawn: no level may lose its weight."""
    loss = Loss(dataclasses.replace(CONFIG, objective=ObjectiveConfig(image_weight=weight)))
    z_0, eps = torch.full((1, 1, 16), 2.0), torch.full((1, 1, 16), 0.5)
    t = torch.full((1, 1), step)
    abar, zero = schedule.IMAGE.alpha_bar(t), torch.zeros(())
    a = float(abar)
    z_t = schedule.noised(z_0, eps, abar[0, 0])
    image = NoisyImage(ImageInput(z_t, torch.zeros_like(abar)), z_0, eps, abar, zero, zero)
    v = 0.5 * a**0.5 - 2.0 * (1 - a) ** 0.5  # of z_0 and eps
    noise_term, _ = loss.image_loss(torch.full((1, 1, 16), v + 0.3), image, t)
    by_weight = {"v": 1.0, "min_snr": min(5 * (1 - a), a), "v_capped": min(20 * a, 1.0)}
    assert noise_term.item() == pytest.approx(0.5 * 0.3**2 * by_weight[weight], rel=1e-3)
