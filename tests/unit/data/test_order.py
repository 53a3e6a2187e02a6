from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.data.mixture import QUOTA_BLOCK, Mixture, Source, exact_quotas, interleave
from mdm.data.order import Interleaving, Order, RowLayout, SourceOrder, permute, sample_ids
from mdm.dist import World
from tests.data_sets import planned

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def mixture(global_batch: int = 24) -> Mixture:
    return Mixture(
        (
            Source("digits", planned([50, 37, 8]), 0.6),
            Source("emoji", planned([11, 30]), 0.25),
            Source("dialogues", planned([29], pictures=False), 0.15),
        ),
        global_batch=global_batch,
    )


@given(st.integers(1, 300), st.binary(min_size=1, max_size=16))
@settings(max_examples=30)
def test_permute_is_a_permutation(n: int, key: bytes) -> None:
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


@given(SHAPES, st.integers(1, 9))
def test_blocks_hold_each_row_once_and_locate_finds_it(shape: list[int], size: int) -> None:
    manifest = planned(shape, batch_rows=size)
    layout = RowLayout(manifest)
    blocks = [layout.block(i) for i in range(layout.blocks)]
    assert all(len(b) == size for b in blocks[:-1])
    rows = np.concatenate(blocks)
    assert sorted(rows.tolist()) == list(range(sum(shape)))
    starts = np.cumsum([0, *shape])
    for row, shard, batch, within in zip(rows, *layout.locate(rows), strict=True):
        assert starts[shard] + batch * size + within == row
        assert within < manifest.shards[shard].batches[batch].rows


@given(SHAPES, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_every_epoch_has_each_row_once(shape: list[int], size: int, window: int, seed: int) -> None:
    layout = RowLayout(planned(shape, batch_rows=size))
    order = SourceOrder("a", layout, seed, window)
    n = layout.rows
    for epoch in range(3):
        rows, epochs = order.rows(epoch * n, (epoch + 1) * n)
        assert sorted(rows.tolist()) == list(range(n))
        assert set(epochs.tolist()) == {epoch}


def test_epochs_seeds_and_names_are_shuffled_apart() -> None:
    layout = RowLayout(planned([64] * 20, batch_rows=8))
    orders = [
        SourceOrder("a", layout, 0, 4).rows(0, layout.rows)[0],
        SourceOrder("a", layout, 0, 4).rows(layout.rows, 2 * layout.rows)[0],
        SourceOrder("a", layout, 1, 4).rows(0, layout.rows)[0],
        SourceOrder("b", layout, 0, 4).rows(0, layout.rows)[0],
        np.arange(layout.rows),
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Independent orders agree in about one place of n.
            assert (one == other).sum() < 12
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_ranks_share_one_global_batch_whatever_their_number(size: int) -> None:
    for step in (0, 1, 7, 100, 12_345_678):
        parts = [sample_ids(mixture(), 5, step, World(rank=r, size=size)) for r in range(size)]
        assert {len(p) for p in parts} == {24 // size}
        assert [i for p in parts for i in p] == sample_ids(mixture(), 5, step, World())


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_each_sample_once_an_epoch_at_any_world_size(size: int) -> None:
    manifest = planned([50, 37, 9])  # 96 rows: 4 steps of 24
    for epoch in range(3):
        seen = Counter(
            i
            for step in range(4 * epoch, 4 * epoch + 4)
            for rank in range(size)
            for i in sample_ids(manifest, 1, step, World(rank=rank, size=size), global_batch=24)
        )
        assert seen == {f"noise:{row}": 1 for row in range(96)}


def test_a_world_that_does_not_divide_the_batch_is_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match="global batch 64 is not divisible by 3 ranks"):
        sample_ids(planned([100]), 0, 0, World(rank=0, size=3))
    with pytest.raises(ValueError, match="global_batch is 8 but the mixture's is 24"):
        sample_ids(mixture(), 0, 0, global_batch=8)
    with pytest.raises(ValueError, match="step is -1"):
        sample_ids(mixture(), 0, -1)


def test_a_step_has_one_task_and_shares_are_exact() -> None:
    order = Order(mixture(), 3)
    used: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    for step in range(QUOTA_BLOCK // 4):
        draw = order.draw(step)
        tasks[draw.task] += 1
        names = Counter(i.partition(":")[0] for i in draw.ids)
        used += names
        assert set(names) <= ({"dialogues"} if draw.task == "text" else {"digits", "emoji"})
    steps = QUOTA_BLOCK // 4
    assert tasks["text"] == pytest.approx(0.15 * steps, abs=1)
    total = 24 * steps
    assert used["digits"] == pytest.approx(0.60 * total, abs=25)
    assert used["emoji"] == pytest.approx(0.25 * total, abs=25)


def test_mixed_sources_are_each_passed_evenly() -> None:
    order = Order(mixture(), 3)
    seen: Counter[tuple[str, int]] = Counter()
    for step in range(40):
        draw = order.draw(step)
        seen.update(zip(draw.ids, draw.epochs.tolist(), strict=True))
    assert set(seen.values()) == {1}  # no sample twice in an epoch
    complete = {(f"digits:{row}", 0) for row in range(95)}
    assert complete <= set(seen)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
@settings(max_examples=30)
def test_quotas_are_exact_and_spread(weights: list[float]) -> None:
    quotas = exact_quotas(weights, [str(i) for i in range(len(weights))])
    assert sum(quotas) == QUOTA_BLOCK
    for weight, quota in zip(weights, quotas, strict=True):
        assert quota == pytest.approx(weight / sum(weights) * QUOTA_BLOCK, abs=1)
    turns = interleave(quotas)
    for k, quota in enumerate(quotas):
        assert (turns == k).sum() == quota
        # Evenly spread: any prefix has its share, to within one turn a source.
        count = np.cumsum(turns == k)
        ideal = np.arange(1, QUOTA_BLOCK + 1) * quota / QUOTA_BLOCK
        assert np.abs(count - ideal).max() <= len(weights)


@given(st.integers(0, 5 * QUOTA_BLOCK))
@settings(max_examples=30)
def test_turns_are_counted_by_arithmetic(slot: int) -> None:
    turns = Interleaving((7059, 2941))
    counted = np.bincount(turns.turns(0, slot), minlength=2)
    assert counted.tolist() == turns.before(slot).tolist()


def test_a_share_too_small_to_be_exact_is_refused() -> None:
    with pytest.raises(ValueError, match="'b' has weight 1e-06"):
        exact_quotas([1.0, 1e-6], ["a", "b"])


def test_sources_that_do_not_fit_together_are_refused_with_both_values() -> None:
    other = planned([10])
    object.__setattr__(other, "tokenizer_sha256", "other")
    with pytest.raises(ValueError, match="tokenizer_sha256 is tokenizer and other"):
        Mixture((Source("a", planned([10]), 1), Source("b", other, 1)))
