"""The objective: what carries gradients, how noise levels are drawn, nothing hidden."""

import dataclasses

import pytest
import torch

from mdm.config import ObjectiveConfig
from mdm.diffusion.schedule import STEPS
from mdm.objective import Objective
from tests.golden.test_losses import CONFIG, batch


@pytest.fixture
def objective() -> Objective:
    torch.manual_seed(0)
    made = Objective(CONFIG)
    torch.nn.init.normal_(made.network.image_out.weight, std=0.1)
    return made


def test_is_a_pure_function_of_weights_and_batch(objective):
    objective.eval()  # running statistics stand still
    first = objective(batch(0), 0)
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(first, objective(batch(0), 0), strict=True))


def test_diffusion_losses_do_not_reach_the_image_encoder(objective):
    terms = objective(batch(0), 0)
    (terms.eps_img + terms.se_img).backward()
    vae = objective.vae
    for name in ("image_mean", "image_log_sigma", "image_decoder"):
        assert all(p.grad is None for p in getattr(vae, name).parameters()), name
    assert objective.network.image_out.weight.grad.abs().sum() > 0


def test_text_latents_are_detached_on_their_way_in(objective):
    """Only the logits, <h, mu_v> + b_v, move the vocabulary's means, not the noisy input."""
    with torch.no_grad():
        objective.network.text_out.weight.zero_()
        objective.network.text_out.bias.zero_()  # h = 0: the logits' gradient by mu_v vanishes
    objective(batch(0), 0).se_txt.backward()
    assert objective.vae.vocabulary.weight.grad.abs().max() < 1e-7


def test_text_alone_has_no_image_terms(objective):
    terms = objective(batch(3), 3)
    assert terms.rec_img == terms.eps_img == terms.se_img == 0
    assert terms.se_txt > 0
    terms.total.backward()
    assert torch.isfinite(terms.total)


def test_prompt_tokens_are_not_predicted(objective):
    text = batch(3)
    everything = dataclasses.replace(text, prompt=torch.ones_like(text.prompt))
    assert objective(everything, 3).se_txt == 0


def test_shares_of_noise_levels():
    weights = ObjectiveConfig()
    config = dataclasses.replace(CONFIG, objective=weights)
    objective = Objective(config)
    n = 20_000
    many = dataclasses.replace(
        batch(0), class_ids=torch.zeros(n, dtype=torch.long), latents=torch.zeros(n, 4, 16)
    )
    uniforms = torch.rand(n, 8, generator=torch.Generator().manual_seed(0))
    levels = objective.draw_levels(uniforms, many)
    shares = {
        "p_text_to_image": levels.t_txt == 0,
        "p_image_to_text": levels.t_img == 0,
        "p_image": levels.t_txt == STEPS,
        "p_text": levels.t_img == STEPS,
    }
    for name, mask in shares.items():
        assert mask.float().mean().item() == pytest.approx(getattr(weights, name), abs=0.015), name
    kept = levels.class_ids >= 0
    assert not kept[levels.t_txt != STEPS].any()
    among = kept[levels.t_txt == STEPS].float().mean().item()
    assert among == pytest.approx(weights.p_class, abs=0.02)
    assert not ((levels.t_img == 0) & (levels.t_txt == 0)).any()


def test_running_statistics_normalise_the_latents(objective):
    shifted = dataclasses.replace(batch(0), latents=3 + 2 * torch.randn(8, 4, 16))
    before = objective.vae.image_running_mean.clone()
    objective(shifted, 0)
    assert (objective.vae.image_running_mean > before).all()
    mean, sigma = objective.vae.encode_image(shifted.latents)
    s = (mean + sigma * torch.randn_like(mean)).detach()
    for _ in range(600):
        objective.vae.track(s.mean((0, 1)), s.var((0, 1)))
    z_0 = objective.vae.normalize_image(s)
    assert z_0.mean().abs() < 0.1
    assert z_0.std().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(
        objective.vae.denormalize_image(objective.vae.normalize_image(mean)), mean
    )
