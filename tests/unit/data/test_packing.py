from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.config import ModelConfig
from mdm.data import packing
from mdm.data.loader import Loader
from mdm.data.mixture import Mixture, Source
from mdm.data.order import SampleOrder, sample_ids
from mdm.data.trace import locate, packs_of
from mdm.first_stage.tokenizer import PAD
from mdm.utils.ranks import World
from tests.data_sets import encoded

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 12), st.sampled_from([None, (2, 2)]))
@settings(deadline=None)
def test_a_plan_holds_each_sample_once_and_overfills_no_row(
    lengths: list[int], rows: int, grid: tuple[int, int] | None
) -> None:
    beside = packing.beside(grid)
    assert beside == (4 if grid is None else 10)  # [time][class] [pad pad], and [pad 4 pad]
    packs = packing.plan(lengths, 32, rows, beside)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert len(packs) >= rows
    for pack in packs:
        assert sum(lengths[i] + beside for i in pack) <= 32 + beside
    if len(packs) > rows:  # only if needed: a row is added when a sample fits in no other
        assert all(packs)


@given(st.integers(8, 40), st.sampled_from([1, 2, 3, 8]))
@settings(deadline=None)
def test_the_ranks_have_all_rows_in_order_and_equally_many_each(rows: int, ranks: int) -> None:
    packs = [[i] for i in range(rows)]
    shares = [packing.share(packs, rank, ranks) for rank in range(ranks)]
    assert len({len(s) for s in shares}) == 1
    assert [p for s in shares for p in s if p] == packs
    assert all(any(s) for s in shares)


def test_a_row_too_short_for_its_samples_is_refused_with_both_values() -> None:
    assert packing.room(20, 10, 2) == 10
    with pytest.raises(ValueError, match=r"3 samples a row take 33 places.* but a row has 30"):
        packing.room(20, 10, 3)


def test_rows_are_filled_from_their_start() -> None:
    texts = [np.array(t, np.uint16) for t in ([5, 6, 2], [7, 2], [8, 9, 9, 2])]
    tokens, prompt, text_of = packing.fill([[2], [0, 1], []], texts, [1, 0, 2], 6)
    assert tokens.tolist() == [[8, 9, 9, 2, PAD, PAD], [5, 6, 2, 7, 2, PAD], [PAD] * 6]
    assert text_of.tolist() == [[0] * 4 + [-1] * 2, [1, 1, 1, 2, 2, -1], [-1] * 6]
    assert prompt.sum(1).tolist() == [2, 1, 0]


MODEL = ModelConfig(vocab_size=60, image_height=2, image_width=2)  # batches are checked for it
LENGTH = {False: 40, True: 30}  # of text-only rows, and beside images


def load(mixture: Mixture, world: World | None = None, length: int | None = None) -> Loader:
    of_texts, beside_images = (length or LENGTH[images] for images in (False, True))
    lengths = {"caption_length": beside_images, "dialogue_length": of_texts}
    return Loader(mixture, 1, world, **lengths, model=MODEL)


@pytest.fixture(scope="module", params=[False, True], ids=["texts", "images"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Samples with images or without, two or four a row."""
    folder = str(tmp_path_factory.mktemp("talk"))
    talk = encoded(folder, [90, 70], images=request.param, part_shards=1)
    packed = {"images_per_row": 2} if request.param else {"texts_per_row": 4}
    return Mixture((Source("talk", talk),), global_batch=6, shuffle_window=3, **packed)


def test_a_packed_batch_holds_the_samples_of_its_step(mixture: Mixture) -> None:
    has_images = bool(mixture.images)
    count = mixture.slots("image_text" if has_images else "text")
    with load(mixture) as loader, load(Mixture(mixture.sources, count, 3)) as unpacked:
        for step in range(6):  # of one epoch, so no sample comes twice
            batch, plain = next(loader), next(unpacked)
            assert batch.tokens.shape == (6, LENGTH[has_images])
            assert batch.average_over == count
            assert sorted(batch.ids) == sorted(plain.ids) == sorted(sample_ids(mixture, 1, step))
            for number, name in enumerate(batch.ids):
                other = plain.ids.index(name)
                text = plain.tokens[other][plain.tokens[other] != PAD]
                assert batch.tokens[batch.text_of == number].tolist() == text.tolist()
                for field in ("keys", "epochs", "class_ids", "latents"):
                    ours, theirs = getattr(batch, field), getattr(plain, field)
                    if has_images or field != "latents":
                        assert torch.equal(ours[number], theirs[other]), field
    with pytest.raises(ValueError, match="samples are packed"):
        sample_ids(mixture, 1, 0, World(0, 2))


def test_the_ranks_hold_the_rows_of_one(mixture: Mixture) -> None:
    with (
        load(mixture) as whole,
        load(mixture, World(0, 2)) as one,
        load(mixture, World(1, 2)) as two,
    ):
        for _ in range(3):
            together, first, second = next(whole), next(one), next(two)
            assert together.ids == first.ids + second.ids
            assert torch.equal(together.tokens, torch.cat([first.tokens, second.tokens]))
            assert first.average_over == second.average_over == together.average_over // 2
            if mixture.images:
                assert first.latents is not None
                assert second.latents is not None
                latents = torch.cat([first.latents, second.latents])
                assert torch.equal(together.latents, latents)


def test_samples_that_do_not_fit_get_more_rows(mixture: Mixture) -> None:
    for size in (1, 2):
        loaders = [load(mixture, World(r, size), length=10) for r in range(size)]
        batches = [next(loader) for loader in loaders]
        assert len({b.tokens.shape for b in batches}) == 1
        assert sum(len(b.tokens) for b in batches) > 6
        assert sorted(i for b in batches for i in b.ids) == sorted(sample_ids(mixture, 1, 0))
        for loader in loaders:
            loader.close()


def test_a_trace_names_the_row_that_samples_share(mixture: Mixture) -> None:
    with load(mixture) as loader:
        batch = next(loader)
    draw = SampleOrder(mixture, 1).draw(0)
    packs = packs_of(mixture, draw, LENGTH[bool(mixture.images)])
    traces = locate(mixture, draw.ids, draw.epochs.tolist(), packs)
    for number, name in enumerate(batch.ids):
        row = int((batch.text_of == number).any(1).nonzero()[0, 0])
        assert traces[draw.ids.index(name)].pack == row
    assert Path(traces[0].uri, traces[0].shard).exists()
