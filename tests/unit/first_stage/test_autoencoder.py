import json

import pytest
import torch

from mdm.first_stage.autoencoder import Autoencoder, build, save
from mdm.first_stage.folder import WEIGHTS
from mdm.first_stage.train_autoencoder import (
    TrainAutoencoderConfig,
    channel_statistics,
    evenly,
    fit,
    psnr,
    reconstruction_loss,
)

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 1.0, 0.5, 3.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("autoencoder") / "ae"
    save(build(16, (8, 8, 8)), path, MEAN, STD)
    return path


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()


def test_latents_and_pixels_have_the_documented_shapes(folder, pixels):
    autoencoder = Autoencoder.load(folder)
    assert (autoencoder.image_size, autoencoder.grid, autoencoder.latent_dim) == (16, (2, 2), 16)
    latents = autoencoder.encode(pixels)
    assert latents.shape == (3, 4, 16)
    assert latents.dtype == torch.float32
    output = autoencoder.decode(latents)
    assert output.shape == (3, 3, 16, 16)
    assert output.min() >= 0
    assert output.max() <= 1


def test_bytes_and_floats_encode_alike(folder, pixels):
    autoencoder = Autoencoder.load(folder)
    torch.testing.assert_close(autoencoder.encode(pixels), autoencoder.encode(pixels.float() / 255))


def test_tokens_are_normalised_patches_row_by_row(folder, pixels):
    autoencoder = Autoencoder.load(folder)
    with torch.no_grad():
        cells = autoencoder._model.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    latents = autoencoder.encode(pixels)
    for row in range(2):
        for column in range(2):
            patch = cells[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            token = latents[:, row * 2 + column].view(3, 2, 2, 4).permute(0, 3, 1, 2)
            expected = (patch - torch.tensor(MEAN).view(1, 4, 1, 1)) / torch.tensor(STD).view(
                1, 4, 1, 1
            )
            torch.testing.assert_close(token, expected)


def test_decode_undoes_the_normalisation_and_the_patches(folder, pixels):
    autoencoder = Autoencoder.load(folder)
    with torch.no_grad():
        cells = autoencoder._model.encode(pixels.float() / 127.5 - 1).latent_dist.mean
        expected = (autoencoder._model.decode(cells).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(pixels)), expected)


def test_an_image_wider_than_high(folder):
    autoencoder = Autoencoder.load(folder)
    latents = autoencoder.encode(torch.rand(1, 3, 8, 24))
    assert latents.shape == (1, 3, 16)
    assert autoencoder.decode(latents, (1, 3)).shape == (1, 3, 8, 24)


def test_the_sha256_depends_on_weights_and_config(folder, tmp_path):
    same = Autoencoder.load(folder).sha256
    assert Autoencoder.load(folder).sha256 == same
    model = build(16, (8, 8, 8))
    save(model, tmp_path / "a", MEAN, STD)
    save(model, tmp_path / "b", MEAN, [1.0, 1.0, 1.0, 1.0])
    shas = {Autoencoder.load(tmp_path / name).sha256 for name in "ab"}
    assert len(shas | {same}) == 3


def test_a_folder_without_channel_statistics_uses_its_scaling_factor(folder, tmp_path, pixels):
    model = build(16, (8, 8, 8))
    model.save_pretrained(tmp_path / "sd")
    autoencoder = Autoencoder.load(tmp_path / "sd")
    with torch.no_grad():
        cells = autoencoder._model.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    scaled = cells * autoencoder._model.config.scaling_factor
    torch.testing.assert_close(
        autoencoder.encode(pixels).square().sum(), scaled.square().sum(), rtol=1e-4, atol=0
    )


def test_broken_folders_and_shapes_are_value_errors(folder, tmp_path, pixels):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Autoencoder.load(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="no diffusion_pytorch_model"):
        Autoencoder.load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match="autoencoder"):
        Autoencoder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="VQModel, not AutoencoderKL"):
        Autoencoder.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="autoencoder"):
        Autoencoder.load(tmp_path)
    autoencoder = Autoencoder.load(folder)
    with pytest.raises(ValueError, match="10 x 16 is not a multiple of 8"):
        autoencoder.encode(pixels[:, :, :10])
    with pytest.raises(ValueError, match="not \\[B, 3, H, W\\]"):
        autoencoder.encode(pixels[:, :1])
    with pytest.raises(ValueError, match="not \\[B, 2 x 2, 16\\]"):
        autoencoder.decode(torch.zeros(1, 5, 16))
    with pytest.raises(ValueError, match="image_size 30 is not a multiple of 8"):
        build(30)


def config(folder, **flags):
    datasets = (f"imagenet={folder}",)
    return TrainAutoencoderConfig(
        datasets=datasets, lr=1e-2, kl_weight=1e-4, precision="fp32", **flags
    )


def test_training_lowers_the_loss_and_the_statistics_normalise_latents(tmp_path):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 2, (64, 3, 2, 2), generator=generator) * 255
    images = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3).byte()
    torch.manual_seed(0)
    model = build(16, (8, 16, 16))
    losses = fit(model, {"solid": images}, config(tmp_path, steps=80, batch=16))
    first, last = (
        sum(term["reconstruction"] for term in part) for part in (losses[:5], losses[-5:])
    )
    assert last < 0.7 * first
    save(model, tmp_path / "ae", *channel_statistics(model, images))
    latents = Autoencoder.load(tmp_path / "ae").encode(images).view(-1, 4)
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_a_training_of_any_length_runs(steps, tmp_path):
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    model = build(8, (8, 8))
    losses = fit(model, {"black": images}, config(tmp_path, steps=steps, batch=2))
    assert [term["step"] for term in losses] == [*range(1, steps + 1)]


def test_psnr_of_a_constant_error():
    target = torch.zeros(2, 3, 4, 4)
    assert psnr(target + 0.1, target) == pytest.approx(20.0, abs=1e-3)


def test_a_wrong_tone_costs_its_square_times_the_weight():
    target = torch.zeros(1, 3, 4, 4)
    output = target + 0.5  # no edges
    costs = [reconstruction_loss(output, target, w).item() for w in (0.0, 16.0)]
    assert costs == pytest.approx([0.5, 0.5 + 16 * 0.25])


def test_the_images_that_are_measured_reach_from_the_first_to_the_last():
    assert evenly(torch.arange(9), 3).tolist() == [0, 4, 8]
    assert evenly(torch.arange(2), 3).tolist() == [0, 1]
