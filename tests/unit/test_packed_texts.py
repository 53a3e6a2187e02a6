"""Packed texts through the whole loss: each as if it were alone."""

import dataclasses

import numpy as np
import pytest
import torch

from mdm.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from mdm.data import packing
from mdm.data.batch import Batch
from mdm.first_stage.tokenizer import EOS
from mdm.loss import Loss
from mdm.model.inputs import TextInput
from mdm.model.sequence import FRAME, Texts, text_rows
from mdm.train.metrics import sums_by_conditioning

LENGTH, ROWS = 24, 3
SIZES = [5, 14, 1, 3, 6, 2, 4, 9]


def objective(**settings) -> Loss:
    model = {
        "d_model": 32, "n_layer": 4, "d_state": 8, "headdim": 16, "chunk_size": 8, "n_heads": 4,
        "n_kv_heads": 2, "vocab_size": 40, "n_classes": 4, "image_height": 2, "image_width": 2,
        "text_length": LENGTH, "eq17_logits": True,
    }  # fmt: skip
    weights = ObjectiveConfig(
        target=settings.pop("target", "one_hot"),
        image_candidates="latents",
        p_self_condition=settings.pop("estimate", 0.0),
    )
    torch.manual_seed(0)
    loss = Loss(
        Config(
            model=ModelConfig(**model | settings),
            objective=weights,
            data=DataConfig(caption_length=6, dialogue_length=LENGTH),
            seed=3,
        )
    )
    for p in loss.parameters():  # nothing may be zero at the start and hide a difference
        with torch.no_grad():
            p.add_(0.05 * torch.randn_like(p))
    return loss


def alone(number: int) -> Batch:
    random = np.random.default_rng(number)
    size = SIZES[number]
    tokens = torch.tensor([[*random.integers(5, 40, size - 1), EOS]])
    return Batch(
        ids=(f"talk:{number}",),
        keys=torch.tensor([1000 + number]),
        epochs=torch.tensor([number % 2]),
        class_ids=torch.tensor([-1]),
        tokens=tokens,
        prompt=torch.arange(size)[None] < size // 3,
        latents=None,
    )


def packed(average_over: int = len(SIZES)) -> Batch:
    packs = packing.plan(SIZES, LENGTH, ROWS)
    assert len(packs) == ROWS
    assert max(map(len, packs)) >= 3
    singles = [alone(i) for pack in packs for i in pack]
    texts = [alone(i).tokens[0].numpy().astype(np.uint16) for i in range(len(SIZES))]
    tokens, prompt, text_of = packing.fill(packs, texts, [s // 3 for s in SIZES], LENGTH)
    return Batch(
        ids=tuple(b.ids[0] for b in singles),
        keys=torch.cat([b.keys for b in singles]),
        epochs=torch.cat([b.epochs for b in singles]),
        class_ids=torch.cat([b.class_ids for b in singles]),
        tokens=torch.from_numpy(tokens),
        prompt=torch.from_numpy(prompt),
        latents=None,
        text_of=torch.from_numpy(text_of),
        average_over=average_over,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scan_mode": "separate"},
        {"decoder": "transformer", "n_layer": 2},
        {"long_skip": True, "estimate": 1.0},
        {"target": "theorem1", "n_layer": 2},
    ],
)
def test_losses_and_gradients_are_those_of_the_texts_alone(settings) -> None:
    loss = objective(**settings)
    batch = packed()
    batch.check(loss.model)
    together = loss(batch, 0)
    together.total.backward()
    grads = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad()
    singles = [loss(alone(i), 0) for i in range(len(SIZES))]
    scalars = [terms[:-2] for terms in singles]
    means = [torch.stack(term).mean() for term in zip(*scalars, strict=True)]
    for name, term, mean in zip(together._fields, together[:-2], means, strict=False):
        torch.testing.assert_close(term, mean, rtol=1e-5, atol=1e-6, msg=name)
    sums = sum(sums_by_conditioning(terms) for terms in singles)
    torch.testing.assert_close(sums_by_conditioning(together), sums, rtol=1e-5, atol=1e-6)
    means[0].backward()
    assert {n for n, p in loss.named_parameters() if p.grad is not None} == grads.keys()
    for name, p in loss.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("decoder", ["mamba", "transformer"])
@torch.no_grad()
def test_a_text_does_not_depend_on_its_neighbours(decoder: str) -> None:
    network = objective(decoder=decoder).network
    batch = packed()
    z, count = torch.randn(ROWS, LENGTH, 16), len(batch.ids)
    level, classes = torch.linspace(-2, 2, count), torch.full((count,), -1)
    rows = text_rows(batch.text_of, count, network.trunk.scans)
    row = next(r for r in range(ROWS) if len(batch.text_of[r].unique()) > 2)
    own = batch.text_of == batch.text_of[row, 0]

    def predict(z: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return network(TextInput(z, level, batch.prompt, rows=rows), classes).text[own]

    other = torch.where(own.unsqueeze(2), z, z + torch.randn_like(z))
    else_level = torch.where(torch.arange(count) == batch.text_of[row, 0], level, level + 1)
    torch.testing.assert_close(predict(other, else_level), predict(z, level), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(predict(z + own.unsqueeze(2), level), predict(z, level))


def test_ranks_average_to_the_mean_over_all_texts() -> None:
    loss = objective()
    whole = loss(packed(), 0)
    batch = packed(average_over=len(SIZES) // 2)
    halves = []
    for rows in (slice(0, 1), slice(1, ROWS)):
        text_of = batch.text_of[rows]
        first, last = int(text_of[text_of >= 0].min()), int(text_of.max()) + 1
        fields = {k: getattr(batch, k)[first:last] for k in ("ids", "keys", "epochs", "class_ids")}
        halves.append(
            loss(
                dataclasses.replace(
                    batch,
                    **fields,
                    tokens=batch.tokens[rows],
                    prompt=batch.prompt[rows],
                    text_of=torch.where(text_of < 0, -1, text_of - first),
                ),
                0,
            )
        )
    for term, one, two in zip(whole[:-2], *(h[:-2] for h in halves), strict=True):
        torch.testing.assert_close((one + two) / 2, term, rtol=1e-5, atol=1e-6)


def test_rows_are_framed_text_by_text() -> None:
    assert FRAME == 4
    rows = text_rows(torch.tensor([[0, 0, 1, -1, -1, -1, -1, -1], [2] * 8]), 3, [((2, 2),)])
    assert rows.seq_idx.tolist() == [[0] * 6 + [1] * 5 + [3], [2] * 12]
    assert rows.frame.T.tolist() == [[0, 1, 2, 5], [6, 7, 8, 10], [12, 13, 14, 23]]
    assert rows.place[0].tolist() == [3, 4, 9, *[24] * 5]
    assert rows.position[0].tolist() == [0, 1, 0, *[0] * 5]
    order, inverse = (t.squeeze(1) for t in rows.orders[(2, 2),][:2])
    assert order[:12].tolist() == [5, 4, 3, 2, 1, 0, 10, 9, 8, 7, 6, 11]
    assert order[inverse].tolist() == list(range(24))


def test_means_are_over_texts_not_over_tokens() -> None:
    texts = Texts(torch.tensor([[0, 1, 1, 1, -1]]), 2, 2)
    values = torch.tensor([[1.0, 4.0, 5.0, 6.0, 99.0]])
    assert texts.sums(values).tolist() == [1.0, 15.0]
    assert texts.mean(values) == 3.0
    assert texts.spread(torch.tensor([7.0, 8.0])).tolist()[0][:4] == [7.0, 8.0, 8.0, 8.0]
