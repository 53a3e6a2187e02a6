"""The decoder: information crosses between text and image, presets have the paper's sizes."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from mdm.config import ModelConfig
from mdm.diffusion import schedule
from mdm.diffusion.score_entropy import log_ratio_vocabulary, log_score_ratio
from mdm.model.count import trunk_macs
from mdm.model.decoder import Decoder
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.sequence import Layout, scan_order
from mdm.presets import DEV_1GPU, MDM_1B, MDM_7B
from tests.helpers import ROOT

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


LAYOUT = Layout(5, 1, (2, 3))  # 17 tokens


def call(network: Decoder, z_txt, z_img, class_ids=None, text=None, images=None):
    """One evaluation of two samples at log-SNR 0; `text` and `images` replace input fields."""
    level, prompt = torch.zeros(2), torch.zeros(2, z_txt.shape[1], dtype=torch.bool)
    text_input = TextInput(z_txt, level, prompt)._replace(**text or {})
    image_input = None
    if z_img is not None:
        level = torch.zeros(2, z_img.shape[1] // 6)
        image_input = ImageInput(z_img, level)._replace(**images or {})
    return network(
        text_input, torch.tensor([0, -1] if class_ids is None else class_ids), image_input
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_mode": "alternate"},
        {"scan_mode": "separate"},
        {"scan_mode": "alternate", "scans": "12/1"},
        {"scan_mode": "separate", "scans": "12/1"},
        {"scan_mode": "alternate", "long_skip": True},
        {"decoder": "transformer", "n_heads": 4, "n_kv_heads": 2},
    ],
)
def test_every_token_influences_every_other(changes):
    torch.manual_seed(0)
    network = Decoder(dataclasses.replace(SMALL, **changes))
    torch.nn.init.normal_(network.image_out.weight)
    z_txt = torch.randn(2, 5, 16, requires_grad=True)
    z_img = torch.randn(2, 6, 16, requires_grad=True)
    prediction = call(network, z_txt, z_img)
    assert prediction.image.shape == z_img.shape
    assert prediction.text.shape == z_txt.shape
    for output, source in ((prediction.image, z_txt), (prediction.text, z_img)):
        (grad,) = torch.autograd.grad(output[:, 2].sum(), source, retain_graph=True)
        assert (grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("mode", "scans", "turns"),
    [
        ("alternate", "1234/12", [[(1, 1)], [(2, 2)], [(3, 1)], [(4, 2)]]),
        ("alternate", "12/1", [[(1, 1)], [(2, 1)]] * 2),
        ("separate", "1234/12", [[(1, 1), (2, 2), (3, 1), (4, 2), (1, 1), (2, 2)]] * 4),
        ("separate", "12/1", [[(1, 1), (2, 1), (1, 1)]] * 4),
    ],
)
def test_scans_of_every_mode(mode, scans, turns):
    trunk = Decoder(dataclasses.replace(SMALL, scan_mode=mode, scans=scans)).trunk
    assert [list(block) for block in trunk.scans] == turns
    for block, own in zip(trunk.blocks, turns, strict=True):
        assert {p.shape[0] for p in block.mixer.parameters()} == {len(own)}
    trunk(torch.randn(1, 17, 32), LAYOUT).square().sum().backward()
    grads = [p.grad.flatten(1) for block in trunk.blocks for p in block.mixer.parameters()]
    assert all((g.abs().amax(1) > 0).all() for g in grads)


def test_text_alone_runs_the_same_parameters():
    network = Decoder(SMALL)
    prediction = call(network, torch.randn(2, 5, 16), None)
    assert prediction.image is None
    prediction.text.sum().backward()
    assert all(p.grad is not None for p in network.trunk.blocks.parameters())


def test_condition_prompt_and_level_change_the_answer():
    torch.manual_seed(0)
    network = Decoder(SMALL)
    z_txt, z_img = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    base = call(network, z_txt, z_img).text
    changes = [
        {"class_ids": [1, 2]},
        {"text": {"prompt": torch.eye(2, 5, dtype=torch.bool)}},
        {"text": {"level": torch.full((2,), 3.0)}},
        {"text": {"estimate": torch.ones(2, 5, 16)}},
        {"images": {"level": torch.full((2, 1), 3.0)}},
    ]
    for change in changes:
        assert not torch.allclose(base, call(network, z_txt, z_img, **change).text), change


def on_meta(config: ModelConfig) -> tuple[int, int, Decoder]:
    """Parameters of the trunk and of the whole network."""
    with torch.device("meta"):
        network = Decoder(config)
    trunk, whole = (sum(p.numel() for p in m.parameters()) for m in (network.trunk, network))
    return trunk, whole, network


def test_the_papers_parameters():
    trunk, whole, network = on_meta(MDM_7B.model)
    mixers = [sum(p.numel() for p in block.mixer.parameters()) for block in network.trunk.blocks]
    assert mixers == [6 * 25_847_232] * 49
    assert trunk == sum(mixers) + 49 * 2048
    assert f"{trunk / 1e9:.2f}" == "7.60"
    assert whole == 7_611_515_552


def test_the_documented_command_prints_the_documented_line():
    page = (ROOT / "docs" / "reference" / "presets.md").read_text()
    (code,) = re.findall(r'^python -c "(import torch; from mdm.presets .*)"$', page, re.M)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True)
    assert printed.stdout == "7.60 B, 49, 2048\n", printed.stderr
    assert f"prints `{printed.stdout.strip()}`" in page


def test_the_papers_gflops():
    trunk, _, network = on_meta(MDM_1B.model)
    assert [b.mixer.in_proj.weight.shape[0] for b in network.trunk.blocks] == [1] * 49
    assert f"{trunk / 1e9:.2f}" == "1.47"
    assert len(network.trunk.skips) == 24
    # "424 GFLOPs": 256 image tokens have 376, a grid of 17 x 17 the printed figure.
    assert round(trunk_macs(MDM_1B.model, 256).products / 1e9) == 376
    assert f"{trunk_macs(MDM_1B.model, 289).products / 1e9:.1f}" == "424.1"
    assert round(trunk_macs(MDM_7B.model, 256).products / 1e9) == 1945
    assert round(trunk_macs(MDM_7B.model, 256).mixing / 1e9) == 81


def test_the_single_gpu_preset_is_small():
    assert 0.15e9 < on_meta(DEV_1GPU.model)[1] < 0.25e9


def test_long_skips_join_mirrored_blocks():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, n_layer=5)
    plain = Decoder(config).trunk
    skipping = Decoder(dataclasses.replace(config, long_skip=True)).trunk
    skipping.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 17, 32)
    assert torch.equal(plain(x, LAYOUT), skipping(x, LAYOUT))
    blocks, skips = skipping.blocks, skipping.skips
    assert len(skips) == 2
    for skip in skips:
        torch.nn.init.normal_(skip.weight, std=0.1)

    def run(i, x):
        return blocks[i](x, scan_order(LAYOUT, skipping.scans[i], x.device))

    first = run(0, x)
    second = run(1, first)
    y = run(2, second)
    y = run(3, y + skips[0](torch.cat([y, second], -1)))
    y = run(4, y + skips[1](torch.cat([y, first], -1)))
    torch.testing.assert_close(skipping(x, LAYOUT), y)


def test_several_images_depend_on_each_other_and_on_their_positions():
    torch.manual_seed(0)
    network = Decoder(SMALL)
    torch.nn.init.normal_(network.image_out.weight)
    z_txt = torch.randn(2, 5, 16)
    z_img = torch.randn(2, 12, 16, requires_grad=True)
    levels = torch.tensor([[20.0, 0.0], [20.0, 1.0]])
    prediction = call(network, z_txt, z_img, images={"level": levels}).image
    assert prediction.shape == z_img.shape
    (grad,) = torch.autograd.grad(prediction[:, 8].sum(), z_img, retain_graph=True)
    assert (grad.abs().amax(-1) > 0).all()
    places = torch.tensor([[0, 3], [1, 3]])

    def at(places):
        return call(network, z_txt, z_img, images={"level": levels, "at": places})

    placed, moved, beside = at(places), at(places.flip(1)), at(torch.full((2, 2), -1))
    assert not torch.allclose(placed.text, moved.text)
    assert not torch.allclose(placed.text, beside.text)
    torch.testing.assert_close(beside.image, prediction)


def test_eq_17_in_the_logits_is_its_energy():
    torch.manual_seed(0)
    network = Decoder(dataclasses.replace(SMALL, eq17_logits=True))
    means = torch.nn.functional.rms_norm(torch.randn(50, 16), (16,))
    t = torch.tensor([300, 700])
    abar = schedule.TEXT.alpha_bar(t)
    z_txt = schedule.noised(means[:10].view(2, 5, 16), torch.randn(2, 5, 16), abar[:, None, None])
    level = schedule.TEXT.log_snr(t)
    silent = call(network, z_txt, None, text={"level": level}).text
    with torch.no_grad():
        network.eq17_gain.bias.fill_(1.0)
    added = call(network, z_txt, None, text={"level": level}).text - silent
    energies = log_ratio_vocabulary(z_txt, means, abar[:, None].expand(2, 5))
    torch.testing.assert_close(
        (added @ means.T).log_softmax(-1), log_score_ratio(energies), rtol=1e-4, atol=1e-3
    )
