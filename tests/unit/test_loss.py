"""The loss: which terms carry gradients, how noise levels are drawn, no hidden randomness."""

import dataclasses
import math

import pytest
import torch

from mdm.config import ObjectiveConfig
from mdm.data.batch import Batch
from mdm.diffusion import noise, schedule
from mdm.diffusion.levels import CONDITIONINGS
from mdm.diffusion.schedule import STEPS
from mdm.first_stage.tokenizer import EOS, PAD
from mdm.loss import Loss
from mdm.model.inputs import TextInput
from mdm.model.mdm import text_logits
from mdm.model.sequence import Samples
from mdm.train.metrics import sums_by_conditioning
from tests.golden.test_losses import CONFIG, batch


@pytest.fixture
def objective() -> Loss:
    torch.manual_seed(0)
    loss = Loss(CONFIG)
    torch.nn.init.normal_(loss.network.image_out.weight, std=0.1)
    return loss


def test_the_loss_is_a_pure_function_of_weights_and_batch(objective):
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


def test_a_prefix_is_given_of_captions_and_of_replies():
    """Clean, like a prompt, for a share of the texts; its length is even from none to all but one.

    Tokens: a prompt of two, a reply of six with its end, two of padding.
    """
    n = 6000
    objective = with_objective(
        p_text_to_image=0.1, p_image_to_text=0.4, p_image=0.1, p_text=0.2, p_prefix=0.5
    )
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, EOS, PAD, PAD]]).expand(n, -1)
    texts = Batch(
        ids=tuple(f"a:{i}" for i in range(n)),
        keys=torch.arange(n),
        epochs=torch.zeros(n, dtype=torch.long),
        class_ids=torch.full((n,), -1),
        tokens=tokens,
        prompt=(torch.arange(10) < 2).expand(n, -1),
        latents=torch.zeros(n, 4, 16),
    )
    noisy = objective.noise_inputs(texts)
    prompt, kinds = noisy.text.input.prompt, noisy.levels.conditioning
    given = prompt[:, 2:].sum(1)
    for name in ("answer", "text_alone"):
        mine = kinds == CONDITIONINGS.index(name)
        shares = torch.bincount(given[mine], minlength=6) / mine.sum()
        expected = torch.tensor([0.5 + 0.5 / 6, *[0.5 / 6] * 5])
        torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)
        assert torch.equal(prompt[mine, 2:].sum(1), prompt[mine, 2:].cumprod(1).sum(1)), "a gap"
    seen = noisy.levels.self_conditions.float()
    assert seen[given > 0].mean().item() == pytest.approx(seen.mean().item(), abs=0.04)
    others = kinds == CONDITIONINGS.index("both")
    assert others.any()
    assert not given[others].any()
    clean = noisy.text.means[tokens]
    z_t = noisy.text.input.z_t
    error = (z_t - clean).abs().amax(-1)
    largest = objective.vae.text_sigma(clean).amax() * 6
    assert error[:, 2:][prompt[:, 2:]].max() < largest
    logits = torch.zeros(n, 10, CONFIG.model.vocab_size)
    logits[:, 2:5] = torch.randn(3, CONFIG.model.vocab_size)  # matter only if they are noised
    loss = objective.text_loss(logits, noisy.text, Samples(None, n, n))
    even = math.log(CONFIG.model.vocab_size)
    torch.testing.assert_close(loss[given >= 3], torch.full((int((given >= 3).sum()),), even))
    assert (loss[given < 3] - even).abs().min() > 1e-3


@pytest.mark.parametrize("length", [1, 2, 17, 512])
def test_the_longest_prefix_leaves_a_token_to_predict(monkeypatch, length):
    model = dataclasses.replace(CONFIG.model, text_length=length)
    data = dataclasses.replace(CONFIG.data, caption_length=length, dialogue_length=length)
    weights = ObjectiveConfig(p_prefix=1.0)
    loss = Loss(dataclasses.replace(CONFIG, model=model, data=data, objective=weights))
    text = dataclasses.replace(
        batch(3),
        tokens=torch.full((len(batch(3)), length), EOS),
        prompt=torch.zeros(len(batch(3)), length, dtype=torch.bool),
    )
    draw = noise.draw

    def largest(*args):
        draws = draw(*args)
        return draws._replace(uniforms=torch.full_like(draws.uniforms, 1 - 2**-24))

    monkeypatch.setattr(noise, "draw", largest)
    prompt = loss.noise_inputs(text).text.input.prompt
    assert prompt.sum(1).tolist() == [length - 1] * len(text)


def test_losses_by_conditioning_add_up_to_the_losses(objective):
    """Each sample counts for one conditioning, and the sums are those of the means."""
    terms = objective(batch(0), 0)
    samples, eps_img, se_img, se_txt = sums_by_conditioning(terms).sum(0)
    n = len(batch(0))
    assert samples == n
    means = torch.stack([eps_img, se_img, se_txt]).float() / n
    expected = torch.stack([terms.eps_img, terms.se_img, terms.se_txt])
    torch.testing.assert_close(means, expected.detach())
    text = sums_by_conditioning(objective(batch(3), 3))
    assert text[CONDITIONINGS.index("text_alone"), 0] == text[:, 0].sum() == len(batch(3))


def test_conditionings_are_named_by_what_is_given():
    objective = Loss(CONFIG)
    n = 4000
    whole = dataclasses.replace(
        batch(0),
        class_ids=torch.zeros(n, dtype=torch.long),
        latents=torch.zeros(n, 4, 16),
        prompt=(torch.arange(n) % 2 == 0).unsqueeze(1).expand(n, batch(0).tokens.shape[1]),
    )
    uniforms = torch.rand(n, 8, generator=torch.Generator().manual_seed(0))
    levels = objective.draw_levels(uniforms, whole)
    named = [CONDITIONINGS[i] for i in levels.conditioning.tolist()]
    for i, name in enumerate(named):
        t_img, t_txt, label = int(levels.t_img[i, -1]), int(levels.t_txt[i]), levels.class_ids[i]
        given = {
            "class_to_image": t_txt == STEPS and label >= 0 and 0 < t_img < STEPS,
            "image": t_txt == STEPS and label < 0 and 0 < t_img < STEPS,
            "text_to_image": t_txt == 0 and 0 < t_img < STEPS,
            "image_to_text": t_img == 0 and 0 < t_txt < STEPS and not whole.prompt[i, 0],
            "answer": t_img == 0 and 0 < t_txt < STEPS and bool(whole.prompt[i, 0]),
            "text_alone": t_img == STEPS and 0 < t_txt < STEPS,
            "both": 0 < t_img < STEPS and 0 < t_txt < STEPS,
        }
        assert given[name], (name, t_img, t_txt, label)
    assert set(named) == set(CONDITIONINGS)


def test_shares_of_noise_levels():
    weights = ObjectiveConfig()
    config = dataclasses.replace(CONFIG, objective=weights)
    objective = Loss(config)
    n = 20_000
    whole = dataclasses.replace(
        batch(0),
        class_ids=torch.zeros(n, dtype=torch.long),
        latents=torch.zeros(n, 4, 16),
        prompt=torch.zeros(n, 1, dtype=torch.bool),
    )
    uniforms = torch.rand(n, 8, generator=torch.Generator().manual_seed(0))
    levels = objective.draw_levels(uniforms, whole)
    shares = {
        "p_text_to_image": levels.t_txt == 0,
        "p_image_to_text": levels.t_img[:, 0] == 0,
        "p_image": levels.t_txt == STEPS,
        "p_text": levels.t_img[:, 0] == STEPS,
    }
    for name, mask in shares.items():
        assert mask.float().mean().item() == pytest.approx(getattr(weights, name), abs=0.015), name
    kept, alone = levels.class_ids >= 0, levels.t_txt == STEPS
    both = (levels.t_txt % STEPS > 0) & (levels.t_img[:, 0] % STEPS > 0)
    assert not kept[~alone & ~both].any()
    assert kept[alone].float().mean().item() == pytest.approx(weights.p_class, abs=0.02)
    assert kept[both].float().mean().item() == pytest.approx(weights.p_class / 2, abs=0.02)
    assert not ((levels.t_img[:, 0] == 0) & (levels.t_txt == 0)).any()


SHIFTED = {1.0: (0.0, 0.25, 0.5, 0.75), 3.0: (0.0, 0.5, 0.75, 0.9)}
"""s t / (1 + (s - 1) t), Eq. 23 of Esser et al. 2024, of the times of s = 1, by hand."""


@pytest.mark.parametrize(("image", "text"), [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)])
def test_shift_of_times(image, text):
    whole = dataclasses.replace(batch(0), latents=torch.zeros(8, 4, 16))
    uniforms = torch.full((8, 8), 0.99)  # both are noised
    uniforms[:, 1] = uniforms[:, 2] = torch.tensor(SHIFTED[1.0] * 2)
    levels = with_objective(image_shift=image, text_shift=text).draw_levels(uniforms, whole)
    for steps, shift in ((levels.t_img[:, 0], image), (levels.t_txt, text)):
        expected = [1 + int(t * (STEPS - 1)) for t in SHIFTED[shift] * 2]
        assert steps.tolist() == pytest.approx(expected, abs=1)


def with_objective(**changes) -> Loss:
    torch.manual_seed(0)
    weights = dataclasses.replace(CONFIG.objective, **changes)
    loss = Loss(dataclasses.replace(CONFIG, objective=weights))
    torch.nn.init.normal_(loss.network.image_out.weight, std=0.1)
    return loss


def two_images(n: int = 8):
    """A dialogue with an image at its second token and another without a position."""
    one = batch(0)
    return dataclasses.replace(
        one,
        latents=torch.cat([one.latents, one.latents.flip(0)], 1),
        image_at=torch.tensor([[1, -1]]).expand(n, 2).contiguous(),
    )


def test_earlier_images_of_a_dialogue_are_given_or_dropped(objective):
    n = 4000
    whole = dataclasses.replace(
        two_images(),
        class_ids=torch.zeros(n, dtype=torch.long),
        latents=torch.zeros(n, 8, 16),
        prompt=torch.zeros(n, 1, dtype=torch.bool),
        image_at=None,
    )
    uniforms = torch.rand(n, 8, generator=torch.Generator().manual_seed(0))
    levels = objective.draw_levels(uniforms, whole)
    former, last = levels.t_img.unbind(1)
    nothing_given = (levels.t_txt == STEPS) | (last == STEPS)
    assert (former == torch.where(nothing_given, STEPS, 0)).all()
    assert ((last > 0) & (last < STEPS) & (former == 0)).any()
    one = dataclasses.replace(whole, latents=torch.zeros(n, 4, 16))
    assert torch.equal(objective.draw_levels(uniforms, one).t_img[:, 0], last)


def test_questions_are_answered_and_not_drawn_from():
    """Unless the image stands in the reply, behind the prompt of two tokens."""
    n = 8
    prompt = torch.zeros(n, 6, dtype=torch.bool)
    prompt[::2, :2] = True
    at = torch.tensor([-1, 1, 2, 5]).repeat_interleave(2).unsqueeze(1)
    mixed = dataclasses.replace(batch(0), prompt=prompt, image_at=at)
    uniforms = torch.full((n, 8), 0.5)
    shares = {"p_text_to_image": 1.0, "p_image_to_text": 0.0, "p_image": 0.0, "p_text": 0.0}
    levels = with_objective(**shares).draw_levels(uniforms, mixed)
    names = [CONDITIONINGS[i] for i in levels.conditioning]
    drawn, answered = "text_to_image", "answer"
    assert names == [answered, drawn, answered, drawn, drawn, drawn, drawn, drawn]
    is_answered = torch.tensor([name == answered for name in names])
    assert torch.equal(levels.t_txt > 0, is_answered)
    assert torch.equal(levels.t_img[:, 0] == 0, is_answered)
    assert torch.equal(levels.scores_txt > 0, is_answered)
    every = with_objective(**shares, answer_prompts=False).draw_levels(uniforms, mixed)
    assert {CONDITIONINGS[i] for i in every.conditioning} == {drawn}


def test_a_dialogue_with_images_trains(objective):
    terms = objective(two_images(), 0)
    terms.total.backward()
    assert terms.eps_img > 0
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    moved = dataclasses.replace(two_images(), image_at=torch.full((8, 2), 3))
    assert objective(moved, 0).eps_img != objective(two_images(), 0).eps_img


def test_a_dropped_text_drops_its_prompt():
    """A question does not influence the loss of an image that is generated without it."""
    objective = with_objective(p_image=1.0, p_text_to_image=0.0, p_image_to_text=0.0, p_text=0.0)
    objective.eval()
    question = dataclasses.replace(batch(0), prompt=torch.eye(8, 6, dtype=torch.bool))
    other = dataclasses.replace(question, tokens=question.tokens.flip(1))
    assert objective(question, 1).eps_img == objective(other, 1).eps_img
    assert objective(question, 1).eps_img > 0


def test_total_is_eq_18_with_its_weights():
    weights = {"lambda_se": 0.7, "eps_image": 0.3, "se_image": 0.2, "beta_kl": 0.05}
    t = with_objective(**weights)(batch(0), 0)
    diffusion = 0.3 * t.eps_img + 0.2 * t.se_img + t.se_txt
    torch.testing.assert_close(t.total, t.rec_img + t.rec_txt + 0.05 * t.kl + 0.7 * diffusion)


def test_the_diffusion_trains_the_image_encoder_only_if_latents_are_not_detached():
    objective = with_objective(detach_latents=False)
    terms = objective(batch(0), 0)
    (terms.eps_img + terms.se_img).backward()
    assert objective.vae.image_mean.weight.grad.abs().sum() > 0


def test_latents_stay_as_they_are_without_normalisation():
    objective = with_objective(normalize_latents=False)
    objective(batch(0), 0)
    assert torch.equal(objective.vae.image_running_mean, torch.zeros(16))
    s = torch.randn(2, 4, 16)
    torch.testing.assert_close(objective.vae.normalize_image(s), s)


def test_text_warp_moves_levels_and_is_saved():
    objective = with_objective(text_warp=True)
    even = objective.draw_levels(torch.full((8, 8), 0.5), batch(3)).t_txt
    with torch.no_grad():
        objective.text_warp.loss.copy_((torch.arange(50) > 40).float())
    late = objective.draw_levels(torch.full((8, 8), 0.5), batch(3)).t_txt
    assert (late > even + 200).all()
    before = objective.text_warp.loss.clone()
    assert any(name.startswith("text_warp") for name in objective.state_dict())
    objective(batch(3), 3)
    assert not torch.equal(objective.text_warp.loss, before)
    objective.eval()
    before = objective.text_warp.loss.clone()
    objective(batch(3), 3)
    assert torch.equal(objective.text_warp.loss, before)


LENGTH, WORDS = 6, 10


def sentences(step: int) -> Batch:
    """Every token determines the next; the first one is given."""
    generator = torch.Generator().manual_seed(step)
    following = torch.randperm(WORDS, generator=torch.Generator().manual_seed(99))
    tokens = [torch.randint(WORDS, (32,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(following[tokens[-1]])
    prompt = torch.zeros(32, LENGTH, dtype=torch.bool)
    prompt[:, 0] = True
    return Batch(
        ids=tuple(f"{step}/{i}" for i in range(32)),
        keys=torch.arange(32) + 32 * step,
        epochs=torch.zeros(32, dtype=torch.long),
        class_ids=torch.full((32,), -1),
        tokens=torch.stack(tokens, 1) + 3,
        prompt=prompt,
        latents=None,
    )


def accuracy_from_context(target: str, steps: int = 120) -> float:
    """Share of right tokens if only the first token is given."""
    torch.manual_seed(0)
    model = dataclasses.replace(CONFIG.model, n_layer=2, dt_min=0.05, dt_max=0.5, a_max=2.0)
    config = dataclasses.replace(
        CONFIG,
        model=model,
        objective=ObjectiveConfig(target=target, image_candidates="latents", p_self_condition=0),
    )
    objective = Loss(config)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2, weight_decay=0)
    for step in range(steps):
        optimizer.zero_grad()
        objective(sentences(step), step).total.backward()
        optimizer.step()
    question = sentences(steps + 1)
    with torch.no_grad():
        means, bias = objective.vae.vocabulary()
        noise = torch.randn(32, LENGTH, 16, generator=torch.Generator().manual_seed(0))
        z_txt = torch.where(question.prompt.unsqueeze(-1), means[question.tokens], noise)
        level = torch.full((32,), schedule.TEXT.log_snr_range()[1])
        text = TextInput(z_txt, level, question.prompt)
        prediction = objective.network(text, question.class_ids)
        right = text_logits(prediction, means, bias).argmax(-1) == question.tokens
    return right[~question.prompt].float().mean().item()


def test_the_one_hot_target_learns_context_and_theorem_1s_cannot():
    assert accuracy_from_context("one_hot") > 0.8
    assert accuracy_from_context("theorem1") < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(8, 11, dtype=torch.long)}, r"\(8, 11\); 8 samples need \[8, 1"),
        ({"tokens": torch.zeros(8, 6)}, r"tokens is torch.float32"),
        (
            {"tokens": torch.full((8, 6), 40)},
            r"sample 0/0 has 40 in tokens.*0 \.\.\. 39.*tokenizer",
        ),
        ({"prompt": torch.zeros(8, 5, dtype=torch.bool)}, r"prompt is torch.bool \(8, 5\)"),
        ({"class_ids": torch.tensor([0] * 7 + [4])}, r"sample 0/7 has 4 in class_ids.*n_classes"),
        ({"latents": torch.zeros(8, 5, 16)}, r"\(8, 5, 16\).*need torch.float32 \(8, 4, 16\)"),
        ({"latents": torch.zeros(8, 4, 8)}, r"\(8, 4, 8\).*need torch.float32 \(8, 4, 16\)"),
        ({"latents": torch.zeros(8, 4, 16).double()}, "latents is torch.float64"),
        ({"image_at": torch.full((8, 1), 6)}, r"has 6 in image_at; it lies in -1 \.\.\. 5"),
        ({"latents": None, "image_at": torch.zeros(8, 1)}, "latents are None"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(batch(0), **changes).check(CONFIG.model)


def test_samples_with_broken_latents_are_named(objective):
    broken = batch(0)
    broken.latents[5, 1, 2] = torch.nan
    broken.latents[6, 0, 0] = torch.inf
    assert not objective(broken, 0).total.isfinite()
    assert broken.nonfinite() == ("0/5", "0/6")
    assert batch(0).nonfinite() == batch(3).nonfinite() == ()


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
