"""The bound of -log p of texts, on data whose exact likelihood and denoiser are known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mdm.config import ModelConfig
from mdm.diffusion import schedule
from mdm.evaluate.likelihood import (
    Latents,
    latents_of,
    network_denoiser,
    per_character,
    text_bound,
)
from mdm.model.inputs import TextInput
from mdm.model.mdm import MDM, text_logits

V, C, M = 6, 4, 8
UNIGRAM = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
ENTROPY = float(-(UNIGRAM * UNIGRAM.log()).sum())
TABLE = torch.Generator().manual_seed(0)
MEAN = torch.nn.functional.normalize(torch.randn(V, C, generator=TABLE), dim=-1) * C**0.5
SIGMA = 0.05 + 0.4 * torch.rand(V, C, generator=TABLE)  # of each token and dimension its own
LATENTS = Latents(MEAN, SIGMA)


def posterior(prior: Tensor):  # type: ignore[no-untyped-def]
    """The exact log posterior of each token alone."""

    def denoiser(z: Tensor, log_snr: Tensor) -> Tensor:
        mean, variance = LATENTS.noised(log_snr)
        normal = torch.distributions.Normal(mean.unsqueeze(1), variance.sqrt().unsqueeze(1))
        return normal.log_prob(z.unsqueeze(2)).sum(-1) + prior.log()

    return denoiser


def nats(denoiser, tokens: Tensor, levels: int = 48) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """The bound of a token and its standard error."""
    bound = text_bound(denoiser, LATENTS, tokens, torch.Generator().manual_seed(1), levels).total
    per_token = bound.double() / tokens.shape[1]
    return float(per_token.mean()), float(per_token.std() / len(tokens) ** 0.5)


def balanced(n: int) -> Tensor:
    """Tokens whose frequencies are those of UNIGRAM, so that their -log p has no variance."""
    counts = (UNIGRAM * n * M).round().long()
    tokens = torch.arange(V).repeat_interleave(counts)
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(2))].view(
        n, M
    )


def marginal_divergence(samples: int = 50_000) -> float:
    """KL(q(z_low) || N(0, I)) of the mixture over the vocabulary: all that the bound may exceed."""
    low = schedule.TEXT.log_snr_range()[1]
    mean, variance = LATENTS.noised(torch.tensor(low))
    generator = torch.Generator().manual_seed(3)
    token = torch.multinomial(UNIGRAM, samples, replacement=True, generator=generator)
    z = mean[token] + variance[token].sqrt() * torch.randn(samples, C, generator=generator)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    mixture = (normal.log_prob(z.unsqueeze(1)).sum(-1) + UNIGRAM.log()).logsumexp(-1)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    return float((mixture - standard).mean())


def test_exact_denoiser_gives_the_entropy() -> None:
    value, error = nats(posterior(UNIGRAM), balanced(2000), levels=64)
    assert error < 0.009
    excess = marginal_divergence()
    assert excess < 0.005
    assert value == pytest.approx(ENTROPY + excess, abs=4 * error)


def test_prior_is_the_divergence_at_the_noisiest_level() -> None:
    far = Latents(MEAN * 20, SIGMA)  # so that it matters
    tokens = balanced(5)
    bound = text_bound(posterior(UNIGRAM), far, tokens, torch.Generator(), 1)
    abar = schedule.TEXT.alpha_bar(torch.tensor(schedule.STEPS - 1)).double()
    spread = (1 - abar + abar * SIGMA[tokens].double() ** 2).sqrt()
    latent = torch.distributions.Normal(abar.sqrt() * far.mean[tokens].double(), spread)
    standard = torch.distributions.Normal(torch.zeros_like(spread), torch.ones_like(spread))
    expected = torch.distributions.kl_divergence(latent, standard).sum((1, 2))
    assert float(expected.mean()) > 1
    assert bound.prior.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    others = bound.diffusion + bound.reconstruction
    assert (bound.total - others).tolist() == pytest.approx(expected.tolist(), rel=0.02)


def test_every_wrong_denoiser_gives_more() -> None:
    exact = posterior(UNIGRAM)
    tokens = balanced(1000)
    value, error = nats(exact, tokens)
    wrong = {
        "uniform prior": posterior(torch.full((V,), 1 / V)),
        "too sure": lambda z, log_snr: 1.5 * exact(z, log_snr),
        "not sure enough": lambda z, log_snr: 0.7 * exact(z, log_snr),
        "blind": lambda z, log_snr: UNIGRAM.log().expand(*z.shape[:2], V),
    }
    for name, denoiser in wrong.items():
        assert nats(denoiser, tokens)[0] > value + 5 * error, name


def test_wrong_prior_costs_its_cross_entropy() -> None:
    other = UNIGRAM.flip(0)
    value, error = nats(posterior(other), balanced(1000))
    # The exact denoiser of another model gives that model's likelihood, with its own divergence
    # from N(0, I) at the noisiest level, a few thousandths.
    assert value == pytest.approx(-float((UNIGRAM * other.log()).sum()), abs=4 * error + 0.006)


def test_denoiser_that_knows_the_neighbour_gives_the_joint_entropy() -> None:
    """Pairs (v, v): the second token is free, if and only if the denoiser reads both latents."""
    alone = posterior(UNIGRAM)

    def joint(z: Tensor, log_snr: Tensor) -> Tensor:
        both = (alone(z, log_snr) - UNIGRAM.log()).sum(1, keepdim=True) + UNIGRAM.log()
        return both.expand(-1, 2, -1)

    tokens = balanced(1000).view(-1, 1).expand(-1, 2)
    value, error = nats(joint, tokens)
    assert value == pytest.approx(ENTROPY / 2, abs=4 * error + 0.004)
    assert nats(alone, tokens)[0] == pytest.approx(ENTROPY, abs=0.03)


def tiny_model() -> MDM:
    torch.manual_seed(4)
    config = ModelConfig(
        d_model=16, n_layer=1, d_state=4, headdim=8, latent_dim=C, vocab_size=V, n_classes=1,
        image_height=1, image_width=1, text_length=M,
    )  # fmt: skip
    return MDM(config).eval()


def test_network_without_knowledge_costs_what_the_closed_form_says() -> None:
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.startswith("text_out"):
                parameter.zero_()
        model.vae.vocabulary.bias.copy_(UNIGRAM.log())
    latents, tokens = latents_of(model), balanced(500)
    bound = text_bound(
        network_denoiser(model, False), latents, tokens, torch.Generator().manual_seed(5), 32
    )
    sigma = latents.sigma[0, 0]
    assert torch.equal(latents.sigma, sigma.expand(V, C))  # as it is at the start
    high, low = (torch.tensor(level).sigmoid() for level in schedule.TEXT.log_snr_range())
    # 1/2 int da / (1 - a (1 - sigma^2))^2 |mu_x - E mu|^2
    keep = 1 - sigma**2
    integral = (1 / (1 - high * keep) - 1 / (1 - low * keep)) / keep
    spread = (latents.mean - UNIGRAM @ latents.mean).square().sum(-1)
    expected = 0.5 * float(integral * (UNIGRAM * spread).sum())
    assert float(bound.diffusion.mean()) / M == pytest.approx(expected, rel=0.02)
    assert float(bound.reconstruction.mean()) / M == pytest.approx(ENTROPY, rel=1e-4)
    least = expected + ENTROPY
    assert least < float(bound.total.mean()) / M + 0.02 * expected < least * 1.05


def test_network_reads_its_own_estimate_of_the_same_latents() -> None:
    model = tiny_model()
    torch.nn.init.normal_(model.network.text_out.weight)
    means, bias = model.vae.vocabulary()
    z, level = torch.randn(3, M, C), torch.tensor([-3.0, 0.0, 3.0])
    with torch.no_grad():
        once, twice = (network_denoiser(model, flag)(z, level) for flag in (False, True))
        nothing = torch.zeros(3, M, dtype=torch.bool), once.softmax(-1) @ means
        again = model.network(TextInput(z, level, *nothing), torch.full((3,), -1))
    assert not torch.allclose(once, twice)
    assert torch.allclose(twice, text_logits(again, means, bias))


def test_error_of_a_ratio_counts_the_texts_of_a_file_once() -> None:
    random = np.random.default_rng(0)
    file = random.normal(2.0, 0.3, 400)
    characters = random.integers(50, 150, 400)
    nats_of = file * characters * math.log(2)
    value, error = per_character(nats_of, characters, np.arange(400))
    assert value == pytest.approx(2.0, abs=4 * error)
    assert error == pytest.approx(0.3 / 20, rel=0.2)
    thrice = [np.repeat(a, 3) for a in (nats_of, characters, np.arange(400))]
    assert per_character(*thrice) == pytest.approx((value, error))
