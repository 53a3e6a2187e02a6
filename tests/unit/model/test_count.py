"""Multiply-accumulates counted from sizes equal those of the operations."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mdm.config import ModelConfig
from mdm.model.count import trunk_macs
from mdm.model.decoder import Trunk
from mdm.model.sequence import Layout

SMALL = ModelConfig(d_model=256, n_layer=3, d_state=16, headdim=32, chunk_size=32, long_skip=True)


def counted(config: ModelConfig, length: int) -> int:
    """Multiply-accumulates of matrix products, as torch counts them."""
    with torch.device("meta"):
        trunk, x = Trunk(config), torch.empty(1, length, config.d_model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(x, Layout(length - 4))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("mode", ["alternate", "separate"])
def test_mamba(mode):
    config = dataclasses.replace(SMALL, scan_mode=mode)
    macs = trunk_macs(config, 96)
    scans = 3 * (6 if mode == "separate" else 1)
    convolution = scans * (512 + 2 * 16) * 4 * 96  # elementwise here
    between = counted(config, 96) - (macs.products - convolution)
    assert 0.5 * macs.mixing < between < 2 * macs.mixing
    assert trunk_macs(config, 192).products == 2 * macs.products
    assert trunk_macs(config, 192).mixing == 2 * macs.mixing


def test_transformer():
    config = dataclasses.replace(SMALL, decoder="transformer", n_heads=8, n_kv_heads=2)
    macs = trunk_macs(config, 96)
    assert counted(config, 96) == macs.products + macs.mixing
    assert trunk_macs(config, 192).mixing == 4 * macs.mixing
