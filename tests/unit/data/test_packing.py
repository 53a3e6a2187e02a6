from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.data import packing
from mdm.data.loader import Loader
from mdm.data.mixture import Mixture, Source
from mdm.data.order import SampleOrder, sample_ids
from mdm.data.trace import locate, packs_of
from mdm.first_stage.tokenizer import PAD
from mdm.utils.ranks import World
from tests.data_sets import encoded

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 12))
@settings(deadline=None)
def test_a_plan_holds_each_text_once_and_overfills_no_row(lengths: list[int], rows: int) -> None:
    packs = packing.plan(lengths, 32, rows)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert len(packs) >= rows
    for pack in packs:
        assert sum(lengths[i] + packing.FRAME for i in pack) <= 32 + packing.FRAME
    if len(packs) > rows:  # only if needed: a row is added when a text fits in no other
        assert all(packs)


@given(st.integers(8, 40), st.sampled_from([1, 2, 3, 8]))
@settings(deadline=None)
def test_the_ranks_have_all_rows_in_order_and_equally_many_each(rows: int, ranks: int) -> None:
    packs = [[i] for i in range(rows)]
    shares = [packing.share(packs, rank, ranks) for rank in range(ranks)]
    assert len({len(s) for s in shares}) == 1
    assert [p for s in shares for p in s if p] == packs
    assert all(any(s) for s in shares)


def test_rows_are_filled_from_their_start() -> None:
    texts = [np.array(t, np.uint16) for t in ([5, 6, 2], [7, 2], [8, 9, 9, 2])]
    tokens, prompt, text_of = packing.fill([[2], [0, 1], []], texts, [1, 0, 2], 6)
    assert tokens.tolist() == [[8, 9, 9, 2, PAD, PAD], [5, 6, 2, 7, 2, PAD], [PAD] * 6]
    assert text_of.tolist() == [[0] * 4 + [-1] * 2, [1, 1, 1, 2, 2, -1], [-1] * 6]
    assert prompt.sum(1).tolist() == [2, 1, 0]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = str(tmp_path_factory.mktemp("talk"))
    talk = encoded(folder, [90, 70], images=False, part_shards=1)
    return Mixture((Source("talk", talk),), global_batch=6, shuffle_window=3, texts_per_row=4)


def test_a_packed_batch_holds_the_texts_of_its_step(mixture: Mixture) -> None:
    with (
        Loader(mixture, 1, caption_length=8, dialogue_length=40) as loader,
        Loader(
            Mixture(mixture.sources, 24, 3), 1, caption_length=8, dialogue_length=40
        ) as unpacked,
    ):
        for step in range(6):  # of one epoch, so no text comes twice
            batch, plain = next(loader), next(unpacked)
            assert batch.tokens.shape == (6, 40)
            assert batch.average_over == 24
            assert sorted(batch.ids) == sorted(plain.ids) == sorted(sample_ids(mixture, 1, step))
            for number, name in enumerate(batch.ids):
                other = plain.ids.index(name)
                text = plain.tokens[other][plain.tokens[other] != PAD]
                assert batch.tokens[batch.text_of == number].tolist() == text.tolist()
                assert batch.keys[number] == plain.keys[other]
                assert batch.epochs[number] == plain.epochs[other]
    with pytest.raises(ValueError, match="texts are packed"):
        sample_ids(mixture, 1, 0, World(0, 2))


def test_texts_that_do_not_fit_get_more_rows(mixture: Mixture) -> None:
    narrow = Mixture(mixture.sources, 6, 3, texts_per_row=4)
    for size in (1, 2):
        loaders = [
            Loader(narrow, 1, World(r, size), caption_length=8, dialogue_length=10)
            for r in range(size)
        ]
        batches = [next(loader) for loader in loaders]
        assert len({b.tokens.shape for b in batches}) == 1
        assert sum(len(b.tokens) for b in batches) > 6
        assert sorted(i for b in batches for i in b.ids) == sorted(sample_ids(narrow, 1, 0))
        for loader in loaders:
            loader.close()


def test_a_trace_names_the_row_that_texts_share(mixture: Mixture) -> None:
    with Loader(mixture, 1, caption_length=8, dialogue_length=40) as loader:
        batch = next(loader)
    draw = SampleOrder(mixture, 1).draw(0)
    packs = packs_of(mixture, draw, 40)
    traces = locate(mixture, draw.ids, draw.epochs.tolist(), packs)
    for number, name in enumerate(batch.ids):
        row = int((batch.text_of == number).any(1).nonzero()[0, 0])
        assert traces[draw.ids.index(name)].pack == row
    assert Path(traces[0].uri, traces[0].shard).exists()
