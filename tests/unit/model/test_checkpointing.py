"""Recomputing blocks in the backward pass changes no bit of losses and gradients."""

import dataclasses

import pytest
import torch

from mdm.model.decoder import Decoder
from mdm.utils.precision import autocast
from tests.unit.model.test_decoder import SMALL, call, trained


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_mode": "separate"},
        {"scan_mode": "alternate", "long_skip": True},
        {"decoder": "transformer", "n_heads": 4, "n_kv_heads": 2},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_no_bit(changes, precision):
    network = trained(dataclasses.replace(SMALL, **changes))
    z_txt, z_img = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    runs = [0]
    for block in network.trunk.blocks:
        block.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    results = []
    for checkpointing in (False, True):
        network.trunk.checkpointing = checkpointing
        network.zero_grad()
        runs[0] = 0
        with autocast(precision):
            prediction = call(network, z_txt, z_img)
        loss = sum(output.float().square().sum() for output in prediction)
        loss.backward()
        assert runs[0] == SMALL.n_layer * (2 if checkpointing else 1)
        results.append([loss.detach(), *(p.grad.clone() for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_gradients_nothing_is_computed_twice():
    network = Decoder(SMALL)
    network.trunk.checkpointing = True
    with torch.no_grad():
        prediction = call(network, torch.randn(2, 5, 16), torch.randn(2, 6, 16))
    assert prediction.text.grad_fn is None
