"""Packed samples through the whole loss: each as if it were alone."""

import dataclasses

import numpy as np
import pytest
import torch

from mdm.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from mdm.data import packing
from mdm.data.batch import Batch
from mdm.first_stage.tokenizer import EOS, PAD
from mdm.loss import Loss
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.sequence import Layout, Samples, pack_rows
from mdm.train.metrics import sums_by_conditioning

LENGTH = 26
SIZES = [5, 14, 1, 3, 6, 2, 4, 9]
GRID = (2, 2)
PACKS = {  # by images a sample
    0: packing.plan(SIZES, LENGTH, 3, packing.beside(None)),
    1: [[2, 3, 5], [1], [0, 4], [6, 7]],
    2: [[2, 5], [1], [0, 3], [4], [6], [7]],
}


def objective(**settings) -> Loss:
    model = {
        "d_model": 32, "n_layer": 4, "d_state": 8, "headdim": 16, "chunk_size": 8, "n_heads": 4,
        "n_kv_heads": 2, "vocab_size": 40, "n_classes": 4, "image_height": 2, "image_width": 2,
        "text_length": LENGTH, "eq17_logits": True,
    }  # fmt: skip
    target = settings.pop("target", "one_hot")
    weights = ObjectiveConfig(
        target=target,
        image_candidates="noises" if target == "one_hot" else "latents",
        se_image=0.1 if target == "one_hot" else 0.0,
        p_text_to_image=0.3,
        p_image_to_text=0.3,
        p_image=0.2,
        p_text=0.1,
        p_self_condition=settings.pop("estimate", 0.0),
        p_prefix=settings.pop("p_prefix", 0.0),
        text_warp=settings.pop("text_warp", False),
    )
    torch.manual_seed(0)
    loss = Loss(
        Config(
            model=ModelConfig(**model | settings),
            objective=weights,
            data=DataConfig(caption_length=6, dialogue_length=LENGTH),
            seed=3,
        )
    ).eval()  # running statistics stand still
    for p in loss.parameters():  # nothing may be zero at the start and hide a difference
        with torch.no_grad():
            p.add_(0.05 * torch.randn_like(p))
    return loss


def alone(number: int, images: int) -> Batch:
    random = np.random.default_rng(number)
    size = SIZES[number]
    tokens = torch.tensor([[*random.integers(5, 40, size - 1), EOS]])
    latents = torch.from_numpy(random.standard_normal((1, 4 * images, 16), np.float32))
    at = torch.tensor([[-1, number % size][:images]])
    return Batch(
        ids=(f"talk:{number}",),
        keys=torch.tensor([1000 + number]),
        epochs=torch.tensor([number % 2]),
        class_ids=torch.tensor([number % 4 if images else -1]),
        tokens=tokens,
        prompt=torch.arange(size)[None] < size // 3,
        latents=latents if images else None,
        image_at=at if images else None,
    )


def joined(singles: list[Batch], **fields: torch.Tensor | int) -> Batch:
    """Samples of `singles` with rows of their texts, as `fields` describe them."""
    names = ["keys", "epochs", "class_ids"]
    names += [] if singles[0].latents is None else ["latents", "image_at"]
    stacked = {name: torch.cat([getattr(b, name) for b in singles]) for name in names}
    ids = tuple(b.ids[0] for b in singles)
    return dataclasses.replace(singles[0], ids=ids, **stacked, **fields)


def packed(images: int = 0, packs: list[list[int]] | None = None) -> Batch:
    packs = packs or PACKS[images]
    assert max(map(len, packs)) >= 2
    texts = [alone(i, 0).tokens[0].numpy().astype(np.uint16) for i in range(len(SIZES))]
    tokens, prompt, text_of = packing.fill(packs, texts, [s // 3 for s in SIZES], LENGTH)
    singles = [alone(i, images) for pack in packs for i in pack]
    return joined(
        singles,
        tokens=torch.from_numpy(tokens),
        prompt=torch.from_numpy(prompt),
        text_of=torch.from_numpy(text_of),
        average_over=len(singles),
    )


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (0, {}),
        (0, {"scan_mode": "separate"}),
        (0, {"decoder": "transformer", "n_layer": 2}),
        (0, {"long_skip": True, "estimate": 1.0}),
        (0, {"p_prefix": 1.0, "n_layer": 2}),
        (0, {"target": "theorem1", "n_layer": 2}),
        (1, {}),
        (1, {"scan_mode": "separate", "n_layer": 2}),
        (1, {"decoder": "transformer", "n_layer": 2}),
        (1, {"long_skip": True, "estimate": 1.0}),
        (1, {"p_prefix": 1.0, "n_layer": 2}),
        (1, {"target": "theorem1", "n_layer": 2}),
        (1, {"adaln": False, "silent": False, "text_summary": "none", "n_layer": 2}),
        (1, {"text_summary": "tokens", "text_head": "latent", "n_layer": 2}),
        (2, {"n_layer": 2}),
    ],
)
def test_losses_and_gradients_are_those_of_the_samples_alone(images: int, settings) -> None:
    loss = objective(**settings)
    batch = packed(images)
    batch.check(loss.model)
    together = loss(batch, 0)
    together.total.backward()
    grads = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad()
    singles = [loss(alone(i, images), 0) for pack in PACKS[images] for i in pack]
    scalars = [terms[:-2] for terms in singles]
    means = [torch.stack(term).mean() for term in zip(*scalars, strict=True)]
    for name, term, mean in zip(together._fields, together[:-2], means, strict=False):
        torch.testing.assert_close(term, mean, rtol=1e-5, atol=1e-6, msg=name)
    per_sample = torch.cat([terms.per_sample for terms in singles])
    torch.testing.assert_close(together.per_sample, per_sample, rtol=1e-4, atol=1e-5)
    assert torch.equal(together.conditioning, torch.cat([t.conditioning for t in singles]))
    assert len(set(together.conditioning.tolist())) >= (4 if images else 1)
    sums = sum(sums_by_conditioning(terms) for terms in singles)
    torch.testing.assert_close(sums_by_conditioning(together), sums, rtol=1e-5, atol=1e-5)
    means[0].backward()
    assert {n for n, p in loss.named_parameters() if p.grad is not None} == grads.keys()
    for name, p in loss.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("decoder", ["mamba", "transformer"])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(decoder: str, images: int) -> None:
    network = objective(decoder=decoder).network
    batch = packed(images)
    z, count = torch.randn(len(batch.tokens), LENGTH, 16), len(batch)
    level, classes = torch.linspace(-2, 2, count), batch.class_ids
    layout = Layout(LENGTH, images, GRID)
    rows = pack_rows(batch.text_of, count, layout, network.trunk.scans)
    row = next(r for r in range(len(z)) if len(batch.text_of[r].unique()) > 2)
    first = int(batch.text_of[row, 0])
    text, own = batch.text_of == first, torch.arange(count) == first
    image_of_own = own.view(-1, 1, 1)

    def predict(z: torch.Tensor, level: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        image = None if latents is None else ImageInput(latents, level[:, None].expand(-1, images))
        out = network(TextInput(z, level, batch.prompt, rows=rows), classes, image)
        return out.text[text] if latents is None else torch.cat([out.text[text], out.image[first]])

    latents = batch.latents
    expected = predict(z, level, latents)
    other = torch.where(text.unsqueeze(2), z, z + torch.randn_like(z))
    else_level = torch.where(own, level, level + 1)
    others = None if latents is None else torch.where(image_of_own, latents, latents + 1)
    found = predict(other, else_level, others)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(predict(z + text.unsqueeze(2), level, latents), expected)
    if latents is not None:
        assert not torch.allclose(predict(z, level, latents + image_of_own), expected)


def rank_of(batch: Batch, rows: slice, ranks: int) -> Batch:
    """The share of a rank that holds these rows."""
    text_of = batch.text_of[rows]
    samples = slice(0, 0)
    if (text_of >= 0).any():
        samples = slice(int(text_of[text_of >= 0].min()), int(text_of.max()) + 1)
    fields = ["ids", "keys", "epochs", "class_ids"]
    fields += [] if batch.latents is None else ["latents", "image_at"]
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[samples] for name in fields},
        tokens=batch.tokens[rows],
        prompt=batch.prompt[rows],
        text_of=torch.where(text_of < 0, -1, text_of - samples.start),
        average_over=len(batch) // ranks,
    )


@pytest.mark.parametrize("images", [0, 1])
def test_ranks_average_to_the_mean_over_all_samples(images: int) -> None:
    """Four ranks with one, one, all further rows, and a row that is empty."""
    loss = objective(estimate=1.0)
    batch = packed(images)
    whole = loss(batch, 0)
    whole.total.backward()
    grads = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    empty = {"tokens": PAD, "prompt": False, "text_of": -1}
    rows = {k: torch.cat([v, torch.full_like(v[:1], empty[k])]) for k, v in
            {k: getattr(batch, k) for k in empty}.items()}  # fmt: skip
    last = len(batch.tokens)
    longer = dataclasses.replace(batch, **rows)
    parts = [slice(0, 1), slice(1, 2), slice(2, last), slice(last, last + 1)]
    shares = [rank_of(longer, part, ranks=4) for part in parts]
    loss.zero_grad()
    terms = []
    for share in shares:
        share.check(loss.model)
        terms.append(loss(share, 0))
        alone = torch.autograd.grad(terms[-1].total, loss.parameters(), allow_unused=True)
        named = zip(loss.named_parameters(), alone, strict=True)
        # Every rank runs the same modules: under ZeRO-3 they would wait for each other.
        assert {n for (n, _), g in named if g is not None} == grads.keys()
        for p, g in zip(loss.parameters(), alone, strict=True):
            if g is not None:
                p.grad = g / 4 if p.grad is None else p.grad + g / 4
    assert len(shares[-1]) == 0
    assert terms[-1].total == 0
    for of_all, *of_ranks in zip(whole[:-2], *(t[:-2] for t in terms), strict=True):
        torch.testing.assert_close(sum(of_ranks) / 4, of_all, rtol=1e-5, atol=1e-6)
    for name, p in loss.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5, msg=name)


def test_running_statistics_are_those_of_the_samples() -> None:
    batch = packed(1)
    padded = torch.full((len(SIZES), LENGTH), PAD)
    unpacked = dataclasses.replace(
        batch, tokens=padded, prompt=padded != PAD, text_of=None, average_over=0
    )
    statistics = []
    for one in (batch, unpacked):
        loss = objective().train()
        loss(one, 0)
        statistics.append(torch.stack([loss.vae.image_running_mean, loss.vae.image_running_var]))
    torch.testing.assert_close(*statistics)
    assert not torch.equal(statistics[0][0], torch.zeros(16))


def test_rows_are_framed_text_by_text() -> None:
    text_of = torch.tensor([[0, 0, 1, -1, -1, -1, -1, -1], [2] * 8])
    rows = pack_rows(text_of, 3, Layout(8), [((2, 2),)])
    assert rows.seq_idx.tolist() == [[0] * 6 + [1] * 5 + [3], [2] * 12]
    assert rows.others.tolist() == [[0, 1, 2, 5], [6, 7, 8, 10], [12, 13, 14, 23]]
    assert rows.place[0].tolist() == [3, 4, 9, *[24] * 5]
    assert rows.position[0].tolist() == [0, 1, 0, *[0] * 5]
    order, inverse = (t.squeeze(1) for t in rows.orders[(2, 2),][:2])
    assert order[:12].tolist() == [5, 4, 3, 2, 1, 0, 10, 9, 8, 7, 6, 11]
    assert order[inverse].tolist() == list(range(24))


def test_rows_are_framed_sample_by_sample() -> None:
    """`[time][class] [pad text pad] [pad image pad]`, with images of two tokens."""
    text_of = torch.tensor([[0, 0, 1] + [-1] * 8, [2, 2, 2] + [-1] * 8])
    rows = pack_rows(text_of, 3, Layout(11, 1, (1, 2)), [((2, 1),)])
    assert rows.seq_idx.tolist() == [[0] * 10 + [1] * 9, [2] * 11 + [3] * 8]
    assert rows.place[:, :3].tolist() == [[3, 4, 13], [22, 23, 24]]
    assert rows.others[0].tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert rows.others[1].tolist() == [10, 11, 12, 14, 15, 16, 17, 18]
    assert rows.others[2].tolist() == [19, 20, 21, 25, 26, 27, 28, 29]
    order = rows.orders[(2, 1),].order.squeeze(1)
    assert order[:10].tolist() == [9, 8, 7, 6, 5, 3, 4, 2, 1, 0]
    places = torch.arange(38).view(1, 38, 1)
    _, (images,) = rows.split(places)
    assert images.squeeze(2).tolist() == [[7, 8], [16, 17], [27, 28]]


def test_means_are_over_samples_not_over_tokens() -> None:
    samples = Samples(torch.tensor([[0, 1, 1, 1, -1]]), 2, 2)
    values = torch.tensor([[1.0, 4.0, 5.0, 6.0, 99.0]])
    assert samples.sums(values).tolist() == [1.0, 15.0]
    assert samples.mean(values) == 3.0
    assert samples.spread(torch.tensor([7.0, 8.0])).tolist() == [[7.0, 8.0, 8.0, 8.0, 0.0]]
    assert samples.average(torch.tensor([[1.0, 2.0], [5.0, 8.0]])).tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    ("text_of", "message"),
    [
        ([[0, 0, 1, 2], [3, -1, -1, -1]], r"row 0 has 8 places; its 3 samples .* need 16"),
        ([[0, -1, 1, -1], [2, 3, -1, -1]], r"row 0 .* and their texts no gap"),
        (
            [[0, 0, 0, 0], [0, 1, 2, 3]],
            r"counts samples \[0, 0, 1, 2, 3\]; it must count 0 \.\.\. 3",
        ),
        ([[0, 0, 1, 1], [3, 3, -1, -1]], r"counts samples \[0, 1, 3\]"),
        ([[1, 1, 0, 0], [2, 3, -1, -1]], r"counts samples \[1, 0, 2, 3\]"),
        ([[0, 0, 1, 1], [2, 2, 4, 4]], r"of row 1 has 4 in text_of; it lies in -1 \.\.\. 3"),
    ],
)
def test_rows_that_do_not_hold_their_samples_are_refused(text_of, message: str) -> None:
    four = joined([alone(i, 0) for i in range(4)])
    rows = torch.tensor(text_of)
    prompt = torch.zeros_like(rows, dtype=torch.bool)
    batch = dataclasses.replace(four, tokens=prompt.long(), prompt=prompt, text_of=rows)
    with pytest.raises(ValueError, match=message):
        batch.check(objective(n_layer=1).model)


def test_a_row_with_images_has_room_for_them() -> None:
    batch = packed(1)
    fewer = rank_of(batch, slice(0, 1), 1)
    fewer.check(objective(n_layer=1).model)
    narrow = {name: getattr(fewer, name)[:, :10] for name in ("tokens", "prompt", "text_of")}
    with pytest.raises(ValueError, match=r"row 0 has 20 places; its 3 samples of 6 .* need 36"):
        dataclasses.replace(fewer, **narrow).check(objective(n_layer=1).model)
