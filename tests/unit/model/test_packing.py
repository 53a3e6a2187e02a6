"""Dropping tokens from the scans: packed rows against each sample run alone."""

import pytest
import torch

from mdm.config import ModelConfig
from mdm.model.decoder import Decoder, Order, Trunk, _order
from mdm.model.packing import sequence_mask

M, GRID = 6, (3, 4)
LENGTH = 2 + M + 2 + 12 + 2


def trunk(**settings):
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32, n_layer=4, d_state=8, headdim=16, chunk_size=8, vocab_size=20, **settings
    )
    return Trunk(config).eval()


@pytest.mark.parametrize("scan_mode", ["alternate", "separate"])
@torch.no_grad()
def test_each_sample_runs_as_if_alone_and_short(scan_mode):
    blocks = trunk(scan_mode=scan_mode)
    x = torch.randn(3, LENGTH, 32)
    keep = torch.rand(3, LENGTH) < torch.tensor([0.3, 0.8, 1.0]).unsqueeze(1)
    out = blocks(x, M, GRID, keep=keep)
    assert torch.equal(out[~keep], x[~keep])
    for i in range(3):
        alone = x[i : i + 1, keep[i]]
        for block, scans in zip(blocks.blocks, blocks.scans, strict=True):
            full = _order(scans, M, GRID, 1, x.device).order
            place = keep[i].cumsum(0) - 1
            order = torch.stack([place[s[keep[i][s]]] for s in full.T], 1)
            alone = block(alone, Order(order, order.argsort(0)))
        torch.testing.assert_close(out[i : i + 1, keep[i]], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_keeping_all_changes_nothing():
    blocks = trunk()
    x = torch.randn(3, LENGTH, 32)
    full = blocks(x, M, GRID)
    packed = blocks(x, M, GRID, keep=torch.ones(3, LENGTH, dtype=torch.bool))
    torch.testing.assert_close(packed, full, rtol=1e-4, atol=1e-5)


def test_head_and_pads_stay_unless_a_sample_is_done():
    keep_txt = torch.tensor([[True, False], [False, False], [False, False]])
    keep_img = torch.tensor([[False, True, False], [False, True, False], [False] * 3])
    mask = sequence_mask(keep_txt, keep_img).int().tolist()
    assert mask[0] == [1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1]
    assert mask[1] == [1, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]
    assert mask[2] == [0] * 11
    two = sequence_mask(keep_txt, keep_img[:, [0, 1, 1, 2]], images=2).int().tolist()
    assert two[0] == [1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]
    assert sequence_mask(keep_txt, None).int().tolist()[:2] == [[1, 1, 1, 1, 0, 1], [0] * 6]


@torch.no_grad()
def test_what_a_dropped_token_holds_reaches_the_others_only_through_the_embedding():
    config = ModelConfig(
        d_model=32, n_layer=4, d_state=8, headdim=16, chunk_size=8, vocab_size=20,
        n_classes=3, image_height=3, image_width=4, text_length=M,
    )  # fmt: skip
    torch.manual_seed(0)
    network = Decoder(config).eval()
    torch.nn.init.normal_(network.image_out.weight, std=0.1)
    z_txt, z_img = torch.randn(2, M, 16), torch.randn(2, 12, 16)
    level, prompt = torch.zeros(2), torch.zeros(2, M, dtype=torch.bool)
    keep_img = torch.ones(2, 12, dtype=torch.bool)
    keep_img[:, 4] = False

    def says(z_img, *keep):
        return network(z_txt, level, prompt, torch.zeros(2).long(), z_img, level, None, None, *keep)

    other = z_img.clone()
    other[:, 4] += 1.0
    keep = (torch.ones_like(prompt), keep_img)
    assert not torch.allclose(says(z_img).image[:, 5], says(other).image[:, 5])
    torch.testing.assert_close(says(z_img, *keep).image[:, 5], says(other, *keep).image[:, 5])
