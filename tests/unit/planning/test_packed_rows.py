"""Memory, work and samples of packed rows."""

import dataclasses

import pytest

from mdm.config import Config, DataConfig, ModelConfig
from mdm.loss import Loss
from mdm.planning import activations as of
from mdm.planning import memory_plan
from mdm.planning.cost import Cluster, estimate, samples_per_step
from mdm.planning.footprint import saved_activations

SIZES = {"d_model": 64, "n_layer": 4, "d_state": 16, "headdim": 16, "chunk_size": 32}
MODEL = ModelConfig(
    **SIZES, vocab_size=300, image_height=4, image_width=4, text_length=48, n_kv_heads=4
)
CLUSTER = Cluster(2, 8, "H100", 0.4, 2.5, 50.0, text_share=0.25)


def config(decoder: str = "mamba", **data: int) -> Config:
    lengths = {"caption_length": 48, "dialogue_length": 40, "global_batch": 6}
    model = dataclasses.replace(MODEL, decoder=decoder)
    return Config(model=model, data=DataConfig(**lengths | data))


@pytest.mark.parametrize("with_image", [True, False])
def test_the_largest_batch_fills_its_rows(with_image: bool) -> None:
    packed = config(images_per_row=2, texts_per_row=3)
    batch = of.largest_batch(packed, 5, with_image)
    batch.check(packed.model)
    layout, k = of.longest(packed, with_image), 2 if with_image else 3
    assert len(batch) == batch.average_over == 5 * k
    assert batch.tokens.shape == (5, layout.text)
    beside = layout.length - layout.text
    taken = (batch.text_of >= 0).sum(1) + k * beside
    assert taken.tolist() == [layout.length] * 5
    lengths = batch.text_of[batch.text_of >= 0].bincount()
    assert lengths.max() - lengths.min() <= 1


def test_rows_without_room_are_refused() -> None:
    with pytest.raises(
        ValueError, match="4 samples a row take 92 places and more, but a row has 70"
    ):
        of.largest_batch(config(images_per_row=4), 1)


@pytest.mark.parametrize("decoder", ["mamba", "transformer"])
def test_planned_activations_are_those_of_packed_rows(decoder: str) -> None:
    packed = config(decoder, images_per_row=2)
    planned = of.activations(packed, 3, True, "fp32")
    loss = Loss(packed)
    with saved_activations(loss) as saved:
        loss(of.largest_batch(packed, 3), 0)
    assert saved.bytes == pytest.approx(planned.kept(checkpointed=False), rel=0.05)


def test_packed_rows_cost_what_a_row_costs_and_bring_more_samples() -> None:
    padded, packed = config(), config(images_per_row=2)
    one, two = (estimate(c, CLUSTER, 100, 1e12) for c in (padded, packed))
    assert one == two
    assert samples_per_step(padded, CLUSTER) == 6
    assert samples_per_step(packed, CLUSTER) == 6 * (0.75 * 2 + 0.25)


def test_the_memory_plan_names_samples_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def activations(config: Config, rows: int, with_image: bool, precision: str) -> of.Activations:
        return of.Activations(*[rows * (1 + with_image)] * 6)

    monkeypatch.setattr(memory_plan, "activations", activations)
    rows = memory_plan.plan(config(images_per_row=2), 2).rows
    note = next(row.note for row in rows if row.name == "activations")
    assert note.startswith("6 samples of an image and its text in 3 rows of 70 places, ")
