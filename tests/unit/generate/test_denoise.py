"""The denoising loop on a small untrained network: solvers, guidance, blocks, lengths, drops."""

import dataclasses
import functools
import math

import pytest
import torch

from mdm.config import Config, DataConfig, ModelConfig
from mdm.diffusion import schedule
from mdm.first_stage.tokenizer import EOS, PAD
from mdm.generate import denoise as denoising
from mdm.generate.request import Request, Sampling
from mdm.model.embedding import DROPPED
from mdm.model.mdm import MDM

M, N, VOCAB = 12, 16, 29
denoise = functools.partial(denoising.denoise, self_conditions=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Config(
        model=ModelConfig(
            d_model=32,
            n_layer=4,
            d_state=8,
            headdim=16,
            chunk_size=16,
            vocab_size=VOCAB,
            n_classes=3,
            image_height=4,
            image_width=4,
            text_length=M,
        ),
        data=DataConfig(caption_length=M, dialogue_length=M),
    )
    model = MDM(config.model).eval()
    torch.nn.init.normal_(model.network.image_out.weight, std=0.1)
    torch.nn.init.normal_(model.network.text_out.weight, std=0.3)
    return model


def request(image, text, b=3, first=0, **conditions):
    keys = torch.arange(first, first + b)
    return Request(image, text, keys, 5, M, torch.zeros(b).long(), **conditions)


def record(network):
    """The arguments of every evaluation: (text, class_ids, images)."""
    calls = []
    network.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


def prefer(model, token, by):
    with torch.no_grad():
        model.vae.vocabulary.bias[token] += by


@pytest.mark.parametrize("solver", ["dpmpp2m", "eq9", "ddpm"])
def test_a_sample_does_not_depend_on_its_batch(model, solver):
    how = Sampling(image_steps=5, text_steps=7, solver=solver, image_guidance=1.0)
    together = denoise(model, request("generated", "generated"), how)
    alone = denoise(model, request("generated", "generated", b=1, first=2), how)
    torch.testing.assert_close(together.latents[2:], alone.latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(together.tokens[2:], alone.tokens)
    assert together.selected.evaluations == 7


@pytest.mark.parametrize("selection", [0.0, 1e-3])
def test_a_model_of_packed_samples_reads_no_padding(model, selection):
    """A caption with padding gives the image of the caption alone."""
    how = Sampling(image_steps=5, image_guidance=1.0, selection=selection)
    tokens = torch.tensor([[7, 5, EOS], [9, EOS, PAD], [EOS, PAD, PAD]])
    padded = torch.nn.functional.pad(tokens, (0, M - 3), value=PAD)

    def drawn(sample, reads_padding, length):
        given = padded[sample : sample + 1, :length]
        one = request("generated", "given", b=1, first=sample, tokens=given)
        return denoise(
            model, dataclasses.replace(one, length=length, reads_padding=reads_padding), how
        ).latents

    together = request("generated", "given", tokens=padded, reads_padding=False)
    latents = denoise(model, together, how).latents
    for sample, length in enumerate((3, 2, 1)):
        alone = drawn(sample, True, length)
        torch.testing.assert_close(latents[sample : sample + 1], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(drawn(sample, True, M), alone, atol=1e-3)


def test_solvers_differ(model):
    latents = [
        denoise(model, request("generated", "absent"), Sampling(image_steps=5, solver=s)).latents
        for s in ("dpmpp2m", "eq9", "ddpm")
    ]
    assert not torch.allclose(latents[0], latents[1])
    assert not torch.allclose(latents[0], latents[2])


def test_solvers_agree_in_the_limit(model):
    latents = [
        denoise(model, request("generated", "absent"), Sampling(image_steps=n, solver=s)).latents
        for s, n in (("dpmpp2m", 120), ("eq9", 239))
    ]
    torch.testing.assert_close(*latents, rtol=0, atol=0.02)


def test_guidance_acts_only_within_its_interval(model):
    calls = record(model.network)

    def drawn(w, interval):
        calls.clear()
        how = Sampling(image_steps=9, image_guidance=w, interval=interval)
        return denoise(model, request("generated", "absent"), how).latents, len(calls)

    everywhere, all_calls = drawn(2.0, (-math.inf, math.inf))
    nowhere, none = drawn(2.0, (50.0, 60.0))
    within, some = drawn(2.0, (-3.0, 1.0))  # levels -9, -7, ..., 7
    assert (all_calls, none, some) == (18, 9, 12)
    assert torch.equal(nowhere, drawn(0.0, (-math.inf, math.inf))[0])
    assert not torch.allclose(within, everywhere)
    assert not torch.allclose(within, nowhere)


def test_each_modality_has_its_own_guidance(model):
    calls = record(model.network)
    for image, text, expected in ((0, 0, 6), (1, 0, 10), (0, 1, 12), (1, 1, 16)):
        calls.clear()
        how = Sampling(image_steps=4, text_steps=6, image_guidance=image, text_guidance=text)
        denoise(model, request("generated", "generated"), how)
        assert len(calls) == expected


def test_both_modalities_move_from_the_start_and_the_text_goes_on(model):
    calls = record(model.network)
    how = Sampling(image_steps=4, text_steps=6)
    drawn = denoise(model, request("generated", "generated"), how)
    assert drawn.selected.evaluations == len(calls) == 6
    text = [float(text.level[0]) for text, _, _ in calls]
    image = [float(images.level[0]) for _, _, images in calls]
    assert text == pytest.approx([-7, -4.8, -2.6, -0.4, 1.8, 4])
    assert image == pytest.approx([-9, -11 / 3, 5 / 3, 7, 20, 20])


def test_guidance_of_a_joint_sample_acts_at_every_step(model):
    calls = record(model.network)
    how = Sampling(image_steps=5, text_steps=5, image_guidance=1.0)
    denoise(model, request("generated", "generated"), how)
    pairs = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(pairs) == 5
    for (text, _, _), (free, _, _) in pairs:
        assert not torch.equal(text.level, free.level)
        assert (free.level == DROPPED).all()


def test_an_image_to_begin_with_is_noised_to_its_share(model):
    calls = record(model.network)
    latents = torch.randn(3, N, 16)
    how = Sampling(image_steps=3, text_steps=3, image_noise=0.25)
    asked = request("generated", "generated", latents=latents)
    denoise(model, asked, how)
    assert [float(images.level[0]) for _, _, images in calls] == pytest.approx([3, 5, 7])
    z_0 = model.vae.normalize_image(model.vae.encode_image(latents)[0])
    abar = torch.tensor(3.0).sigmoid()
    eps = asked.noise(0, model.network.config)[0]
    torch.testing.assert_close(calls[0][2].z_t, abar.sqrt() * z_0 + (1 - abar).sqrt() * eps)


def test_only_padding_follows_the_first_eos(model):
    prefer(model, EOS, 100.0)
    tokens = denoise(model, request("absent", "generated"), Sampling(text_steps=3)).tokens
    assert (tokens[:, 0] == EOS).all()
    assert (tokens[:, 1:] == PAD).all()


def test_an_eos_in_the_prompt_does_not_end_the_text(model):
    prefer(model, 7, 100.0)
    given = torch.full((3, M), EOS)
    prompt = torch.arange(M).expand(3, M) < torch.tensor([[2], [4], [0]])
    asked = request("absent", "generated", tokens=given, prompt=prompt)
    tokens = denoise(model, asked, Sampling(text_steps=3)).tokens
    assert torch.equal(tokens, torch.where(prompt, EOS, 7))


def test_each_block_is_the_prompt_of_the_next(model):
    prefer(model, EOS, -100.0)
    calls = record(model.network)
    how = Sampling(text_steps=4, text_blocks=3)
    tokens = denoise(model, request("absent", "generated"), how).tokens
    prompts = [text.prompt for text, _, _ in calls]
    assert [int(p[0].sum()) for p in prompts] == [0] * 4 + [4] * 4 + [8] * 4
    assert prompts[-1][0].tolist() == [True] * 8 + [False] * 4
    means = model.vae.vocabulary()[0]
    torch.testing.assert_close(calls[-1][0].z_t[:, :8], means[tokens[:, :8]])
    fresh = request("absent", "generated").noise(0, model.network.config)[1]
    assert torch.equal(calls[4][0].z_t[:, 4:], fresh[:, 4:])


def test_each_token_is_a_block_with_none_given(model):
    """In one evaluation each, from noise; a short reply is complete before a long one."""
    prefer(model, EOS, -100.0)
    calls = record(model.network)
    how = Sampling(text_steps=1, text_blocks=0)
    prompt = torch.arange(M) < torch.tensor([[M - 2], [M - 5]])
    tokens = torch.where(prompt, 7, PAD)
    asked = request("absent", "generated", 2, tokens=tokens, prompt=prompt)
    drawn = denoise(model, asked, how)
    given = [text.prompt.sum(1).tolist() for text, _, _ in calls]
    assert given == [[M - 2 + min(i, 2), M - 5 + i] for i in range(5)]
    assert drawn.selected.evaluations == 5
    for text, _, _ in calls:
        assert float(text.level[0]) == schedule.TEXT.log_snr_range()[1]


def test_no_block_is_generated_after_every_text_has_ended(model):
    prefer(model, EOS, 100.0)
    how = Sampling(text_steps=4, text_blocks=3)
    assert denoise(model, request("absent", "generated"), how).selected.evaluations == 4


def test_a_settled_token_keeps_its_value_and_leaves_the_scans(model):
    prefer(model, EOS, -100.0)
    model.network.text_out.weight.data *= 4  # sure of most tokens
    calls = record(model.network)
    how = Sampling(text_steps=10, selection=0.5)
    drawn = denoise(model, request("given", "generated", latents=torch.randn(3, N, 16)), how)
    when = drawn.selected.text
    assert ((when >= 1) & (when < 9)).any()
    assert (drawn.selected.image == -1).all()
    means = model.vae.vocabulary()[0]
    for i, (text, _, images) in enumerate(calls[: drawn.selected.evaluations]):
        settled = (when >= 0) & (when < i)
        torch.testing.assert_close(text.z_t[settled], means[drawn.tokens[settled]])
        if settled.any():
            assert torch.equal(text.keep, ~settled & ~settled.all(1, keepdim=True))
            assert images.keep.all(1).tolist() == (~settled.all(1)).tolist()


def test_an_image_that_has_settled_needs_no_more_evaluations(model):
    how = Sampling(image_steps=9, selection=1e9)
    drawn = denoise(model, request("generated", "absent"), how)
    # Levels -9, -7, ..., 7: the first above 0 is the sixth.
    assert drawn.selected.evaluations == 6
    assert (drawn.selected.image == 5).all()


def test_no_token_is_dropped_while_the_other_modality_depends_on_it(model):
    calls = record(model.network)
    how = Sampling(image_steps=5, text_steps=9, selection=1e9)
    drawn = denoise(model, request("generated", "generated"), how)
    assert (drawn.selected.image == -1).all()
    assert drawn.selected.text.min() >= 5  # the image has been drawn
    assert all(images.keep is None or images.keep.all() for _, _, images in calls)
    how = Sampling(image_steps=9, text_steps=9, selection=1e9)
    drawn = denoise(model, request("generated", "generated"), how)
    assert (drawn.selected.image == -1).all()
    assert (drawn.selected.text == -1).all()


def test_selection_off_selects_nothing(model):
    drawn = denoise(model, request("generated", "generated"), Sampling(image_steps=4, text_steps=4))
    assert (drawn.selected.image == -1).all()
    assert (drawn.selected.text == -1).all()


def test_a_tiny_threshold_changes_nothing(model):
    plain = denoise(model, request("generated", "generated"), Sampling(image_steps=4, text_steps=4))
    how = Sampling(image_steps=4, text_steps=4, selection=1e-30)
    strict = denoise(model, request("generated", "generated"), how)
    assert torch.equal(plain.latents, strict.latents)
    assert torch.equal(plain.tokens, strict.tokens)


def test_invalid_settings_are_refused_with_the_way_out(model):
    for settings, message in (
        ({"solver": "euler"}, "'euler'; choose one of dpmpp2m"),
        ({"image_noise": 1.5}, "image_noise is 1.5"),
        ({"text_blocks": -1}, "text_blocks is -1; it must be 0, for one a token, or more"),
        ({"image_guidance": math.inf}, "image_guidance is inf; it must be a finite"),
        ({"selection": -1.0}, "selection is -1.0 nats"),
        ({"selection": math.nan}, "selection is nan nats"),
        ({"interval": (1.0, 0.0)}, "runs from 1.0 to 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**settings)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"class_ids": torch.tensor([0, 3])}, r"sample 1 has 3 in class_ids; it lies in -1 .* 2:"),
        ({"tokens": torch.full((2, M), VOCAB)}, r"sample 0 has 29 in tokens.*0 \.\.\. 28"),
        ({"tokens": torch.zeros(2, M - 1).long()}, r"prompt is torch.bool \(2, 12\).*\(2, 11\)"),
        (
            {"latents": torch.zeros(2, N + 1, 16)},
            r"\(2, 17, 16\).*need torch.float32 \(2, 16, 16\)",
        ),
        ({"latents": torch.zeros(3, N, 16)}, r"\(3, 16, 16\); 2 samples"),
        ({"image_at": torch.tensor([[0], [M]])}, r"sample 1 has 12 in image_at.*-1 \.\.\. 11"),
        ({"length": M + 1}, r"tokens have shape \(2, 13\); .* 1 \.\.\. 12 \(model.text_length\)"),
    ],
)
def test_conditions_that_do_not_fit_the_model_are_refused(model, conditions, message):
    valid = Request("given", "generated", torch.arange(2), 0, M, latents=torch.zeros(2, N, 16))
    denoise(model, valid, Sampling(text_steps=2))
    with pytest.raises(ValueError, match=message):
        denoise(model, dataclasses.replace(valid, **conditions), Sampling(text_steps=2))
