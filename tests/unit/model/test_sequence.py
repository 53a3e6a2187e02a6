"""The token layout: scan orders, slices, and dropping tokens from the scans."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm.config import ModelConfig
from mdm.model.decoder import Decoder, Trunk
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.sequence import Layout, Order, join, scan_order

M = 6
LAYOUT = Layout(M, 1, (3, 4))
LENGTH = 2 + M + 2 + 12 + 2


sides = st.integers(1, 9)


@given(sides, sides, st.integers(1, 20), st.integers(1, 4), st.integers(1, 2), st.integers(0, 3))
def test_joint_scan_then_inverse_is_the_identity(h, w, length, image, text, images):
    layout = Layout(length, images, (h, w))
    order, inverse = layout.scan(image, text)
    assert layout.length == 2 + length + 2 + images * (h * w + 2)
    assert sorted(order.tolist()) == list(range(layout.length))
    assert torch.equal(order[inverse], torch.arange(layout.length))


def test_a_reversed_scan_puts_the_image_before_the_text():
    order, _ = Layout(3, 1, (2, 2)).scan(2, 2)
    assert order.tolist() == list(range(13))[::-1]


def test_every_image_is_read_in_the_same_pattern():
    one, two = (Layout(3, images, (2, 3)).scan(3, 1)[0] for images in (1, 2))
    assert torch.equal(two[: len(one)], one)
    assert torch.equal(two[len(one) :] - 8, one[-8:])


def test_slices_of_the_sequence_are_text_and_images():
    parts = [torch.full((2, n, 3), float(i)) for i, n in enumerate((1, 1, 4, 6, 6))]
    pads = [torch.full((2, 1, 3), 9.0)] * 4
    layout = Layout(4, 2, (2, 3))
    x = join(parts[:2], parts[2], parts[3:], pads)
    assert x.shape[1] == layout.length
    text, images = layout.split(x)
    for sliced, part in zip([text, *images], parts[2:], strict=True):
        assert torch.equal(sliced, part)


def trunk(**settings):
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32, n_layer=4, d_state=8, headdim=16, chunk_size=8, vocab_size=20, **settings
    )
    return Trunk(config).eval()


@pytest.mark.parametrize("scan_mode", ["alternate", "separate"])
@torch.no_grad()
def test_each_sample_runs_as_if_alone_without_its_dropped_tokens(scan_mode):
    blocks = trunk(scan_mode=scan_mode)
    x = torch.randn(3, LENGTH, 32)
    keep = torch.rand(3, LENGTH) < torch.tensor([0.3, 0.8, 1.0]).unsqueeze(1)
    out = blocks(x, LAYOUT, keep)
    assert torch.equal(out[~keep], x[~keep])
    for i in range(3):
        alone = x[i : i + 1, keep[i]]
        for block, scans in zip(blocks.blocks, blocks.scans, strict=True):
            full = scan_order(LAYOUT, scans, x.device).order
            place = keep[i].cumsum(0) - 1
            order = torch.stack([place[s[keep[i][s]]] for s in full.T], 1)
            alone = block(alone, Order(order, order.argsort(0)))
        torch.testing.assert_close(out[i : i + 1, keep[i]], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_keeping_all_tokens_changes_nothing():
    blocks = trunk()
    x = torch.randn(3, LENGTH, 32)
    full = blocks(x, LAYOUT)
    packed = blocks(x, LAYOUT, torch.ones(3, LENGTH, dtype=torch.bool))
    torch.testing.assert_close(packed, full, rtol=1e-4, atol=1e-5)


def test_head_and_pads_are_kept_unless_a_sample_is_done():
    keep_txt = torch.tensor([[True, False], [False, False], [False, False]])
    keep_img = torch.tensor([[False, True, False], [False, True, False], [False] * 3])
    mask = Layout(2, 1, (1, 3)).mask(keep_txt, keep_img).int().tolist()
    assert mask[0] == [1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1]
    assert mask[1] == [1, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]
    assert mask[2] == [0] * 11
    two = Layout(2, 2, (1, 2)).mask(keep_txt, keep_img[:, [0, 1, 1, 2]]).int().tolist()
    assert two[0] == [1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]
    assert Layout(2).mask(keep_txt, None).int().tolist()[:2] == [[1, 1, 1, 1, 0, 1], [0] * 6]


@torch.no_grad()
def test_a_dropped_token_reaches_the_others_only_through_the_embedding():
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

    def predict(z_img, keep_txt=None, keep_img=None):
        text = TextInput(z_txt, level, prompt, keep=keep_txt)
        images = ImageInput(z_img, level.unsqueeze(1), keep=keep_img)
        return network(text, torch.zeros(2).long(), images).image[:, 5]

    other = z_img.clone()
    other[:, 4] += 1.0
    keep = (torch.ones_like(prompt), keep_img)
    assert not torch.allclose(predict(z_img), predict(other))
    torch.testing.assert_close(predict(z_img, *keep), predict(other, *keep))
