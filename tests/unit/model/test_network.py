"""The decoder: information crosses between text and picture, presets have the paper's sizes."""

import dataclasses

import pytest
import torch

from mdm.config import ModelConfig
from mdm.model.network import Network
from mdm.presets import MDM_7B

SMALL = ModelConfig(
    d_model=32,
    n_layer=4,
    d_state=8,
    headdim=16,
    chunk_size=16,
    vocab_size=50,
    n_classes=3,
    image_height=2,
    image_width=3,
    text_length=5,
)


def call(network: Network, z_txt, z_img, **changes):
    arguments = {
        "level_txt": torch.zeros(2),
        "prompt": torch.zeros(2, z_txt.shape[1], dtype=torch.bool),
        "class_ids": torch.tensor([0, -1]),
        "z_img": z_img,
        "level_img": None if z_img is None else torch.zeros(2),
    }
    return network(z_txt, **(arguments | changes))


@pytest.mark.parametrize("mode", ["alternate", "separate"])
def test_every_token_hears_every_other(mode):
    torch.manual_seed(0)
    network = Network(dataclasses.replace(SMALL, scan_mode=mode))
    torch.nn.init.normal_(network.image_out.weight)
    z_txt = torch.randn(2, 5, 16, requires_grad=True)
    z_img = torch.randn(2, 6, 16, requires_grad=True)
    said = call(network, z_txt, z_img)
    assert said.image.shape == z_img.shape
    assert said.text.shape == z_txt.shape
    for output, source in ((said.image, z_txt), (said.text, z_img)):
        (grad,) = torch.autograd.grad(output[:, 2].sum(), source, retain_graph=True)
        assert (grad.abs().amax(-1) > 0).all()


def test_text_alone_runs_the_same_parameters():
    network = Network(SMALL)
    said = call(network, torch.randn(2, 5, 16), None)
    assert said.image is None
    said.text.sum().backward()
    assert all(p.grad is not None for p in network.trunk.blocks.parameters())


def test_condition_prompt_and_level_change_the_answer():
    torch.manual_seed(0)
    network = Network(SMALL)
    z_txt, z_img = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    base = call(network, z_txt, z_img).text
    changes = {
        "class_ids": torch.tensor([1, 2]),
        "prompt": torch.eye(2, 5, dtype=torch.bool),
        "level_txt": torch.full((2,), 3.0),
        "level_img": torch.full((2,), 3.0),
        "estimate_txt": torch.ones(2, 5, 16),
    }
    for name, value in changes.items():
        assert not torch.allclose(base, call(network, z_txt, z_img, **{name: value}).text), name


def test_the_papers_decoder_has_7_60_billion_parameters():
    with torch.device("meta"):
        network = Network(MDM_7B.model)
    mixers = sum(p.numel() for block in network.trunk.blocks for p in block.mixer.parameters())
    assert mixers == 49 * 6 * 25_847_232
    assert f"{sum(p.numel() for p in network.parameters()) / 1e9:.2f}" == "7.61"
