"""Each task through the real loop, with a network whose answer is known exactly."""

import pytest
import torch
from torch import Tensor, nn

from mdm.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from mdm.first_stage.tokenizer import EOS, PAD, Tokenizer, train_model
from mdm.generate import Generator
from mdm.generate.denoise import denoise
from mdm.generate.request import ABSENT, GENERATED, Request, Sampling
from mdm.model.decoder import Prediction
from mdm.model.mdm import MDM
from tests.unit.generate.exact import SURE, Conditional, Exact

M, GRID, WIDTH, VOCAB = 20, (2, 2), 32, 28
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MEAN, VARIANCE = 3.0, 4.0  # of first-stage latents: far from those of normalised ones


class Patches:
    """The first stage: an image [c, h, w] is its latents."""

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return latents.unflatten(1, grid).permute(0, 3, 1, 2)


def pixels(latents: Tensor) -> Tensor:
    return Patches().decode(latents, GRID)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(
        train_model([f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:3]], VOCAB)
    )
    return Tokenizer(path)


def generator(tokenizer: Tokenizer, network: type[Exact], texts: list[list[int]], **objective):
    """A generator of as many points as `texts`: latents of random images, and classes 0, 1, ..."""
    model = ModelConfig(
        vocab_size=VOCAB,
        n_classes=4,
        image_height=GRID[0],
        image_width=GRID[1],
        latent_dim=WIDTH,
        text_length=M,
        n_layer=1,
        d_model=32,
        headdim=16,
    )
    config = Config(
        model=model,
        data=DataConfig(caption_length=M, dialogue_length=M),
        objective=ObjectiveConfig(**objective),
    )
    mdm = MDM(model)
    with torch.no_grad():
        mdm.vae.vocabulary.weight.copy_(torch.eye(WIDTH)[:VOCAB])
        mdm.vae.vocabulary.bias.zero_()
        mdm.vae.image_running_mean.fill_(MEAN)
        mdm.vae.image_running_var.fill_(VARIANCE)
        k = len(texts)
        latents = MEAN + VARIANCE**0.5 * torch.randn(
            k, 4, WIDTH, generator=torch.Generator().manual_seed(0)
        )
        means = mdm.vae.vocabulary()[0]
        tokens = torch.tensor([ids + [PAD] * (M - len(ids)) for ids in texts])
        z_img = mdm.vae.normalize_image(latents)
        mdm.network = network(model, means, z_img, tokens, torch.arange(k))
    model_of_points = Generator(config, mdm, tokenizer, Patches(), precision="fp32")
    return model_of_points, latents


@pytest.fixture(scope="module")
def captions(tokenizer) -> list[list[int]]:
    """Two captions, and the first one again without its end: an image of its own."""
    one, two = (tokenizer.encode_caption(text) for text in ("one", "two"))
    return [[*one, EOS], [*two, EOS], one]


@pytest.mark.parametrize("solver", ["dpmpp2m", "eq9", "ddpm"])
def test_an_image_is_the_one_of_its_caption_or_class(tokenizer, captions, solver):
    model, latents = generator(tokenizer, Exact, captions)
    drawn = model.text_to_image(["one", "two"], steps=7, guidance=0.0, solver=solver)
    torch.testing.assert_close(drawn, pixels(latents[:2]), atol=1e-3, rtol=0)
    drawn = model.class_to_image([1, 2, 0], steps=7, guidance=0.0, solver=solver)
    torch.testing.assert_close(drawn, pixels(latents[[1, 2, 0]]), atol=1e-3, rtol=0)


def test_a_caption_is_the_one_of_its_image(tokenizer, captions):
    model, latents = generator(tokenizer, Exact, captions)
    network, given = model.model.network, []
    network.register_forward_pre_hook(lambda _, args: given.append(args[2].z_t))
    assert model.image_to_text(latents[[1, 0, 2]], steps=7) == ["two", "one", "one"]
    for z_t in given:
        torch.testing.assert_close(z_t.double(), network.z_img[[1, 0, 2]])


@pytest.mark.parametrize("solver", ["dpmpp2m", "eq9", "ddpm"])
def test_images_and_captions_from_noise_belong_together(tokenizer, captions, solver):
    model, latents = generator(tokenizer, Exact, captions[:2])
    drawn, texts = model.joint(32, steps=14, guidance=0.0, solver=solver)
    of_image = (drawn[:, None] - pixels(latents)).flatten(2).square().sum(2).argmin(1)
    torch.testing.assert_close(drawn, pixels(latents)[of_image], atol=1e-3, rtol=0)
    assert texts == [("one", "two")[i] for i in of_image.tolist()]
    assert 8 <= of_image.sum() <= 24  # both are equally likely


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guidance_extrapolates_from_the_unconditional_image(tokenizer, captions, weight):
    model, latents = generator(tokenizer, Conditional, captions)
    expected = (1 + weight) * latents[1:2] - weight * latents[0:1]
    drawn = model.text_to_image(["two"], steps=5, guidance=weight)
    torch.testing.assert_close(drawn, pixels(expected), atol=1e-3, rtol=0)
    drawn = model.class_to_image([1], steps=5, guidance=weight)
    torch.testing.assert_close(drawn, pixels(expected), atol=1e-3, rtol=0)


class Scores(nn.Module):
    """Text scores from a function of the inputs, for two tokens; images are not predicted."""

    def __init__(self, exact: Exact, first: int, second: int, score) -> None:
        super().__init__()
        self.config = exact.config
        self.means, self.score, self.pair = exact.means, score, [first, second]

    def forward(self, text, class_ids, images=None) -> Prediction:
        logits = torch.zeros(*text.z_t.shape[:2], VOCAB).double()
        logits[..., self.pair] = self.score(text, images).double()
        h = logits @ self.means / self.means.square().sum(1).mean()
        return Prediction(images.z_t if images else None, h.float())


def test_text_guidance_extrapolates_from_the_scores_without_the_image(tokenizer, captions):
    """Score differences of 0.5 with the image and 1.25 without: they reverse from w = 2/3 on."""
    model, latents = generator(tokenizer, Exact, captions)
    one, two = captions[0][0], captions[1][0]
    with_image, without = torch.tensor([20.5, 20.0]), torch.tensor([20.0, 18.75])

    def given(text, images):
        return with_image if (images.level > 0).all() else without

    model.model.network = Scores(model.model.network, one, two, given)
    for weight, token in ((0.0, one), (0.6, one), (0.75, two), (1.0, two), (-1.0, one)):
        (text,) = model.image_to_text(latents[:1], steps=5, guidance=weight)
        assert text == tokenizer.decode([token] * M), weight


@pytest.mark.parametrize(("share", "index"), [(0.5, 1), (0.0, 0)])
def test_a_model_trained_on_its_own_estimates_reads_them(tokenizer, captions, share, index):
    """The answer is the first token at first, and the second one once there is an estimate."""
    model, latents = generator(tokenizer, Exact, captions, p_self_condition=share)
    pair = captions[0][0], captions[1][0]

    def score(text, images):
        estimated = text.estimate.abs().sum(2, keepdim=True) > 0
        return torch.where(estimated, torch.tensor([0.0, SURE]), torch.tensor([SURE, 0.0]))

    model.model.network = Scores(model.model.network, *pair, score)
    assert model.image_to_text(latents[:1], steps=5) == [tokenizer.decode([pair[index]] * M)]


def test_a_reply_is_what_follows_its_prompt_and_only_that(tokenizer):
    dialogues = [("one",), ("two", "one", "ten")]
    replies = ["two", "six"]
    texts = [
        [*tokenizer.encode_prompt(turns), *tokenizer.encode(reply), EOS]
        for turns, reply in zip(dialogues, replies, strict=True)
    ]
    assert all(len(ids) <= M for ids in texts)
    model, _ = generator(tokenizer, Exact, texts)
    assert model.reply(dialogues, steps=7) == replies
    assert model.reply(dialogues[::-1], steps=7) == replies[::-1]


def test_tokens_drawn_one_by_one_agree_with_each_other(tokenizer):
    """Of three texts the first tokens differ, but two have the same second one.

    The most likely second token is that of two texts; drawn in the same evaluation as the first,
    it also follows the one to which it does not belong.
    """
    a, b, c, x, y = (tokenizer.encode_caption("one two three")[0] + i for i in range(5))
    texts = [[a, x, EOS], [b, y, EOS], [c, y, EOS]]
    model, _ = generator(tokenizer, Exact, texts)
    known = {tokenizer.decode(ids) for ids in texts}
    assert len(known) == 3

    def drawn(blocks: int) -> set[str]:
        sampling = Sampling(text_steps=1, text_blocks=blocks)
        request = Request(ABSENT, GENERATED, torch.arange(40), 0, M)
        rows = denoise(model.model, request, sampling).tokens.tolist()
        return {tokenizer.decode(row) for row in rows}

    assert drawn(0) == known
    assert drawn(1) - known


def test_texts_are_drawn_as_the_model_was_trained(tokenizer, captions):
    """Whole in 20 steps, or token by token in one step each."""
    for share, calls in ((0.0, 20), (0.5, len(captions[1]))):
        model, latents = generator(tokenizer, Exact, captions, p_prefix=share)
        count = []
        model.model.network.register_forward_pre_hook(lambda *_, c=count: c.append(1))
        assert model.image_to_text(latents[:2]) == ["one", "two"]
        assert len(count) == calls, share
        assert model.image_to_text(latents[:2], text_blocks=1) == ["one", "two"]
        assert len(count) == calls + 20
        assert model.image_to_text(latents[:2], text_blocks=0, steps=3) == ["one", "two"]
        assert len(count) == calls + 20 + 3 * len(captions[1])


def test_a_reply_about_an_image_depends_on_it(tokenizer):
    prompt = tokenizer.encode_prompt(("ten",))
    model, latents = generator(
        tokenizer, Exact, [[*prompt, *tokenizer.encode(text), EOS] for text in ("one", "two")]
    )
    assert model.reply([("ten",)] * 2, images=latents.unsqueeze(1), steps=7) == ["one", "two"]
