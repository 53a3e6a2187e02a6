"""At the start, depth changes neither the size of the residual stream nor that of its gradient."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mdm.config import ModelConfig
from mdm.model.decoder import Decoder
from mdm.model.embedding import CLEAN, DROPPED
from mdm.model.inputs import ImageInput, TextInput
from mdm.presets import LEARN

NARROW = dataclasses.replace(
    LEARN.model, n_layer=49, d_model=32, headdim=16, d_state=8, expand=1, kernel="torch"
)
GIVEN = [CLEAN, CLEAN, CLEAN, 0.0]  # log-SNR of each of four samples
NOT_GIVEN = [0.0, DROPPED, CLEAN, DROPPED]
CLASSES = [0, -1, -1, -1]


def streams(config: ModelConfig, skip: float = 0.0) -> list[Tensor]:
    """The stream before the first block and after each, with gradients of the outputs' sum.

    Skips are `skip` times the identity in both of the streams that they read.

    The four samples give and drop text, image and class in different ways.
    """
    torch.manual_seed(0)
    network = Decoder(config)
    torch.nn.init.normal_(network.image_out.weight)  # at the start no gradient passes the heads
    torch.nn.init.normal_(network.text_out.weight)
    with torch.no_grad():
        for linear in network.trunk.skips:
            linear.weight.copy_(skip * torch.eye(config.d_model).repeat(1, 2))
    seen: list[Tensor] = []

    def watch(x: Tensor) -> None:
        x.retain_grad()
        seen.append(x)

    network.trunk.register_forward_pre_hook(lambda _, inputs: watch(inputs[0]))
    for block in network.trunk.blocks:
        block.register_forward_hook(lambda _, inputs, output: watch(output))
    no_prompt = torch.zeros(4, config.text_length, dtype=torch.bool)
    text = TextInput(torch.randn(4, config.text_length, 16), torch.tensor(GIVEN), no_prompt)
    images = ImageInput(torch.randn(4, 4, 16), torch.tensor(NOT_GIVEN).unsqueeze(1))
    out = network(text, torch.tensor(CLASSES), images)
    (out.image.sum() + out.text.sum()).backward()
    return seen


def rms(x: Tensor) -> Tensor:
    """Of each token over samples and width, [l]."""
    return x.detach().square().mean((0, 2)).sqrt()


@pytest.mark.parametrize("mode", ["separate", "alternate"])
@pytest.mark.parametrize("long_skip", [False, True])
def test_the_stream_and_its_gradient_keep_their_size_at_49_blocks(mode, long_skip):
    config = dataclasses.replace(NARROW, scan_mode=mode, long_skip=long_skip)
    seen = streams(config)
    assert len(seen) == 50
    first = rms(seen[0])
    assert all((x.detach().abs().amax(2) > 0).all() for x in seen)  # no token is silent itself
    for x in seen:
        assert ((rms(x) / first) < 2).all()
        assert ((rms(x) / first) > 0.5).all()
    gradients = torch.stack([x.grad.square().mean().sqrt() for x in seen])
    assert gradients.max() / gradients.min() < 2
    # Of each token too: one token's gradient can drown all others when their norm is clipped.
    by_token = torch.stack([rms(x.grad) for x in seen[:25]])
    assert (by_token.amax(0) / gradients[0] < 3).all()


def test_long_skips_that_have_grown_do_not_multiply():
    """24 skips of weight .1 that read the stream itself would multiply its end by 1.2^24."""
    config = dataclasses.replace(NARROW, scan_mode="alternate", long_skip=True)
    seen = streams(config, skip=0.1)
    assert 1.2 < rms(seen[-1]).mean() / rms(seen[0]).mean() < 2
    gradients = torch.stack([x.grad.square().mean().sqrt() for x in seen])
    assert gradients.max() / gradients.min() < 3
