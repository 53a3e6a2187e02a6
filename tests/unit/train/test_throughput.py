import dataclasses

import pytest
import torch

from mdm.model.count import trunk_macs
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.sequence import Layout
from mdm.presets import DEMO
from mdm.train.throughput import Throughput, step_flops
from mdm.utils.ranks import World
from tests.helpers import MemoryLoader, small_config
from tests.unit.test_packed_samples import objective, packed


def test_the_sequence_length_is_that_of_the_network():
    """[time][class] [pad text pad] [pad image pad]: what the embedding makes of the demo."""
    from mdm.model.decoder import Decoder

    model = DEMO.model
    network = Decoder(dataclasses.replace(model, n_layer=1, kernel="torch"))
    seen = []
    network.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    b, m, n = 2, 10, 16
    z_txt, z_img = torch.randn(b, m, model.latent_dim), torch.randn(b, n, model.latent_dim)
    text = TextInput(z_txt, torch.zeros(b), torch.zeros(b, m, dtype=torch.bool))
    classes = torch.full((b,), -1)
    network(text, classes, ImageInput(z_img, torch.zeros(b, 1)))
    network(text, classes)
    assert seen == [Layout.of(model, m, images).length for images in (1, 0)] == [32, 14]
    assert step_flops(model, m, 1) == 6 * sum(trunk_macs(model, seen[0]))


def test_rates_are_of_all_ranks_and_mfu_of_one(tmp_path):
    config = small_config(tmp_path, peak_tflops=1e-6)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, image_height=2, image_width=2)
    )
    work, loader = Throughput(config, World(0, 2)), MemoryLoader(config, World(0, 2))
    for _ in range(3):  # the third has no images
        work.add(next(loader))
    rates = work.rates(2.0)
    assert rates["tokens_per_second"] == 8 * (12 + 4 + 12 + 4 + 12) / 2
    assert rates["images_per_second"] == 8 * 2 / 2
    flops = 8 * (2 * step_flops(config.model, 12, 1) + step_flops(config.model, 12, 0))
    assert rates["tflops_per_rank"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert rates["mfu"] == pytest.approx(flops / 2 / 2 / 1e6)
    assert work.rates(1.0)["tokens_per_second"] == 0


def test_packed_images_count_by_samples_and_work_by_rows(tmp_path):
    model = objective().model
    config = dataclasses.replace(small_config(tmp_path), model=model)
    work, batch = Throughput(config, World(0, 2)), packed(1)
    work.add(batch)
    rates = work.rates(1.0)
    assert rates["images_per_second"] == 2 * 8
    rows = 2 * len(batch.tokens)
    assert rates["tokens_per_second"] == rows * (26 + 4)
    assert rates["tflops_per_rank"] == pytest.approx(rows / 2 * step_flops(model, 26, 1) / 1e12)
