"""Norms by depth, compared with those of a model whose weights are set by hand."""

import dataclasses
from pathlib import Path

import pytest
import torch

from examples.digits import depth
from mdm.config import Config
from mdm.loss import Loss
from mdm.presets import LEARN
from tests.golden.test_losses import CONFIG, batch

THREE = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, n_layer=3, long_skip=True),
    objective=dataclasses.replace(CONFIG.objective, p_self_condition=0.0),
)


@pytest.fixture
def loss() -> Loss:
    torch.manual_seed(0)
    loss = Loss(THREE)
    torch.nn.init.normal_(loss.network.image_out.weight)  # at the start no gradient passes it
    return loss


def test_a_block_without_output_adds_nothing(loss: Loss) -> None:
    with torch.no_grad():
        loss.network.trunk.blocks[1].mixer.out_proj.weight.zero_()
    measured = depth.norms(loss, batch(0))
    assert {len(values) for values in measured.values()} == {3}
    assert measured["branch"][1] == 0.0
    assert measured["stream"][1] == measured["stream"][0]
    assert min(measured["branch"][0], measured["branch"][2]) > 0.01
    assert measured["stream_gradient"][1] == measured["stream_gradient"][0] > 0


def test_norms_are_those_of_autograd(loss: Loss) -> None:
    network, outputs = loss.network, []
    with torch.no_grad():  # the last block then reads x + s norm(x_0) / 2, and adds to that
        network.trunk.skips[0].weight[:, 32:] = 0.5 * torch.eye(32)
    measured = depth.norms(loss, batch(0))
    assert loss.training
    assert all(p.grad is None for p in loss.parameters())

    for block in network.trunk.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    total = loss.eval()(batch(0), 0).total
    first, second, third = outputs
    read = second + torch.nn.functional.rms_norm(first, (32,), eps=1e-5) / 2 / 6**0.5
    added = third - read
    size = first.numel() ** 0.5
    assert measured["stream"] == pytest.approx([float(x.detach().norm()) / size for x in outputs])
    assert measured["branch"][2] == pytest.approx(float(added.detach().norm()) / size, rel=1e-4)
    gradients = torch.autograd.grad(total, outputs, retain_graph=True)
    expected = [float(g.norm()) / size for g in gradients]
    assert measured["stream_gradient"] == pytest.approx(expected, rel=1e-4)
    of_weights = torch.autograd.grad(total, list(network.trunk.blocks[1].parameters()))
    norm = sum(float(g.square().sum()) for g in of_weights) ** 0.5
    assert measured["weight_gradient"][1] == pytest.approx(norm, rel=1e-4)


def test_a_ratio_above_its_bound_is_named() -> None:
    flat = {key: [1.0, 2.0] for key in depth.QUANTITIES}
    results = {"separate": {"start": flat, "end": flat | {"stream": [3.0, 30.0]}}}
    (line,) = depth.exceeded(depth.spreads(results))
    assert line == "separate, end: stream after the block, RMS: largest / smallest 10, bound 4"
    results["separate"]["end"] = flat | {"branch": [float("nan"), 1.0]}
    assert len(depth.exceeded(depth.spreads(results))) == 1
    assert "| stream after the block, RMS | separate | start | 1 | 2 | 2.00 |" in depth.table(
        results, 2
    )
    assert depth.chart(results).count("block</text>") == 8


def test_every_arrangement_is_trained_and_kept(tmp_path: Path, monkeypatch) -> None:
    configs: list[Config] = []

    class Run(depth.ShortRun):
        def __init__(self, config: Config) -> None:
            configs.append(config)
            super().__init__(config)

    monkeypatch.setattr(depth, "ShortRun", Run)
    flags = depth.Flags(out=str(tmp_path), n_layer=2, d_model=32, steps=2, batch=2)
    depth.write_data(tmp_path / "data")
    for _ in range(2):  # the second time, nothing is trained
        results = {
            name: depth.measure(flags, name, tmp_path / "data") for name in depth.ARRANGEMENTS
        }
    assert [(c.model.scan_mode, c.model.long_skip) for c in configs] == [
        ("separate", False),
        ("separate", True),
        ("alternate", False),
        ("alternate", True),
    ]
    assert {c.train.beta2 for c in configs} == {LEARN.train.beta2}
    assert all(len(result["end"]["stream"]) == 2 for result in results.values())
    assert all(min(result["end"]["weight_gradient"]) > 0 for result in results.values())
