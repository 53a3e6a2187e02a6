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
    text_summary="latents",
)


LAYOUT = Layout(5, 1, (2, 3))  # 17 tokens


def trained(config: ModelConfig) -> Decoder:
    """A decoder in which nothing is zero any more, as at the start."""
    torch.manual_seed(0)
    network = Decoder(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


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
    network = trained(dataclasses.replace(SMALL, **changes))
    z_txt = torch.randn(2, 5, 16, requires_grad=True)
    z_img = torch.randn(2, 6, 16, requires_grad=True)
    prediction = call(network, z_txt, z_img)
    assert prediction.image.shape == z_img.shape
    assert prediction.text.shape == z_txt.shape
    assert prediction.pieces.shape == (2, 5, 50)
    outputs = ((prediction.image, z_txt), (prediction.text, z_img), (prediction.pieces, z_img))
    for output, source in outputs:
        (grad,) = torch.autograd.grad(output[:, 2].sum(), source, retain_graph=True)
        assert (grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("mode", "scans", "turns"),
    [
        ("alternate", "1234/12", [[(1, 1)], [(2, 2)], [(3, 1)], [(4, 2)]]),
        ("alternate", "12/1", [[(1, 1)], [(2, 1)]] * 2),
        ("separate", "1234/12", [[(1, 1), (2, 2), (3, 1), (4, 2), (3, 2), (4, 1)]] * 4),
        ("separate", "12/1", [[(1, 1), (2, 1)]] * 4),
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
    network = trained(SMALL)
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
    assert trunk == sum(mixers) + 49 * 4 * 2048  # a norm, and shift, scale and gate
    assert f"{trunk / 1e9:.2f}" == "7.60"
    assert whole == 7_685_745_312


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

    def skip(i, y, early):
        pair = [t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() for t in (y, early)]
        return y + skips[i](torch.cat(pair, -1)) / 10**0.5

    y = run(3, skip(0, y, second))
    y = run(4, skip(1, y, first))
    torch.testing.assert_close(skipping(x, LAYOUT), y)


def test_several_images_depend_on_each_other_and_on_their_positions():
    network = trained(SMALL)
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


@pytest.mark.parametrize("changes", [{}, {"decoder": "transformer", "n_heads": 4, "n_kv_heads": 2}])
@torch.no_grad()
def test_what_is_dropped_is_silent(changes):
    network = trained(dataclasses.replace(SMALL, **changes))
    one, other = torch.randn(2, 2, 5, 16).unbind()
    image, noise = torch.randn(2, 2, 6, 16).unbind()
    dropped = {"text": {"level": torch.full((2,), -20.0)}}

    def v(z_txt, **more):
        return call(network, z_txt, image, **more).image

    assert not torch.allclose(v(one), v(other))
    assert torch.equal(v(one, **dropped), v(other, **dropped))
    seen = {"text": dropped["text"] | {"estimate": torch.ones(2, 5, 16)}}
    assert torch.equal(v(one, **dropped), v(one, **seen))
    dropped = {"images": {"level": torch.full((2, 1), -20.0)}}
    texts = (call(network, one, shown, **dropped).text for shown in (image, noise))
    assert torch.equal(*texts)
    embedded = []  # the token of no class stands at its place and adds nothing to any other
    network.trunk.register_forward_pre_hook(lambda _, args: embedded.append(args))
    v(one, class_ids=[-1, -1])
    network.embed.class_embedding.weight[-1] += 1.0
    v(one, class_ids=[-1, -1])
    (x, *_, modulation), (moved, *_, same) = embedded
    assert torch.equal(modulation, same)
    assert (moved != x).flatten(2).any(2).tolist() == [[i == 1 for i in range(17)]] * 2


@torch.no_grad()
def test_the_parts_of_a_token_have_one_size_at_the_start():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, d_model=256, text_length=64)
    embed = Decoder(config).embed
    z_txt, z_img = torch.randn(500, 64, 16), torch.randn(500, 6, 16)
    levels = torch.linspace(-20, 20, 500)
    parts = {
        "patch": embed.image_in(z_img),
        "text": embed.text_in(torch.cat([z_txt, torch.zeros_like(z_txt)], -1)),
        "level": embed.level(levels),
        "label": embed.class_embedding.weight,
        "summary": embed.summary(
            embed.text_in(torch.cat([z_txt, torch.zeros_like(z_txt)], -1)).amax(1)
        ),
        "image position": embed.image_position,
        "text position": embed.text_position,
        "time": embed.time_token,
        "pads": embed.pads,
    }
    for name, part in parts.items():
        assert part.square().mean().sqrt() == pytest.approx(0.5, rel=0.25), name


def test_levels_and_labels_modulate_every_token_by_its_own():
    """A text token's depends on its own level and on the class; a patch's on the text too."""
    network = trained(SMALL)
    z_txt, z_img = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    seen = []
    network.trunk.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    prompt = torch.zeros(2, 5, dtype=torch.bool)
    prompt[:, :2] = True
    call(network, z_txt, z_img, text={"prompt": prompt, "level": torch.tensor([1.0, 2.0])})
    text, (image,) = LAYOUT.split(seen[0])
    level = network.embed.level
    label = network.embed.class_embedding.weight[0]

    def expected(log_snr, label):
        condition = level(torch.tensor(log_snr)) + label
        return network.embed.modulation(torch.nn.functional.silu(condition))

    torch.testing.assert_close(text[0, 0], expected(20.0, label))
    torch.testing.assert_close(text[0, 4], expected(1.0, label))
    torch.testing.assert_close(text[1, 4], expected(2.0, torch.zeros(32)))
    latents = network.embed.text_in(torch.cat([z_txt, torch.zeros_like(z_txt)], -1))
    summary = network.embed.summary(latents.amax(1))
    torch.testing.assert_close(image[0, 3], expected(0.0, label + summary[0]))
    torch.testing.assert_close(image[1, 3], expected(0.0, summary[1]))


@torch.no_grad()
def test_a_zero_modulation_changes_nothing():
    torch.manual_seed(0)
    network = Decoder(SMALL)
    plain = Decoder(dataclasses.replace(SMALL, adaln=False))
    missing = plain.load_state_dict(network.state_dict(), strict=False)
    assert not missing.missing_keys
    for decoder in (network, plain):
        torch.nn.init.eye_(decoder.image_out.weight)
    inputs = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    torch.testing.assert_close(call(network, *inputs).image, call(plain, *inputs).image)


@pytest.mark.parametrize("n_layer", [2, 24])
def test_gradients_at_the_start_do_not_grow_with_depth(n_layer):
    """Without a class, and with a modality dropped, no token may be zero: RMSNorm divides by it."""
    torch.manual_seed(0)
    network = Decoder(dataclasses.replace(SMALL, n_layer=n_layer))
    torch.nn.init.normal_(network.image_out.weight, std=32**-0.5)
    dropped = {"level": torch.tensor([-20.0, 0.0])}
    shown = torch.randn(2, 5, 16), torch.randn(2, 6, 16), [-1, -1]
    call(network, *shown, text=dropped).image.square().mean().backward()
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    assert 0.01 < torch.stack(norms).norm() < 10
