from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.data.batch import sample_keys
from mdm.data.layout import RowLayout
from mdm.data.loader import extend_digest
from mdm.data.mixture import (
    QUOTA_PERIOD,
    Interleaving,
    Mixture,
    MixtureStage,
    Source,
    exact_quotas,
    interleave,
)
from mdm.data.order import SampleOrder, SourceOrder, sample_ids
from mdm.data.shuffle import Permutation, shuffled
from mdm.utils.ranks import World
from tests.data_sets import planned

SHUFFLED = [2, 7, 3, 6, 0, 1, 4, 5]
SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def mixture(global_batch: int = 24) -> Mixture:
    return Mixture(
        (
            Source("digits", planned([50, 37, 8]), 0.6),
            Source("emoji", planned([11, 30]), 0.25),
            Source("dialogues", planned([29], images=False), 0.15),
        ),
        global_batch=global_batch,
    )


@given(st.integers(1, 300), st.binary(min_size=1, max_size=16))
@settings(max_examples=30, deadline=None)
def test_permute_is_a_permutation(n: int, key: bytes) -> None:
    permutation = Permutation(n, key)
    sent = [permutation.at(i) for i in range(n)]
    assert sorted(sent) == list(range(n))
    assert [permutation.source(i) for i in sent] == list(range(n))


def test_a_shuffle_is_the_same_with_every_numpy() -> None:
    assert shuffled(8, bytes(range(16)), stream=3).tolist() == SHUFFLED
    assert sorted(shuffled(1000, b"k")) == list(range(1000))
    assert (shuffled(1000, b"k") == shuffled(1000, b"k", stream=1)).sum() < 10


@given(SHAPES, st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_shuffled_batches_hold_each_row_once_and_locate_finds_it(
    shape: list[int], size: int, part_shards: int
) -> None:
    manifest = planned(shape, batch_rows=size, part_shards=part_shards)
    layout = RowLayout(manifest)
    found = []
    for part in range(layout.parts):
        batches = [layout.batch(part, i) for i in range(layout.part(part).batches)]
        assert all(len(b) == size for b in batches[:-1])
        for i, batch in enumerate(batches):
            first = layout.part_start[part]
            assert {layout.part(part).batch_of(row - first) for row in batch.tolist()} == {i}
        found += batches
    rows = np.concatenate(found)
    assert sorted(rows.tolist()) == list(range(sum(shape)))
    starts = np.cumsum([0, *shape])
    for row, shard, batch, within in zip(rows, *layout.locate(rows), strict=True):
        assert starts[shard] + batch * size + within == row
        assert within < manifest.shards[shard].batches[batch].rows


LARGER = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@given(LARGER, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_every_epoch_has_each_row_once_and_the_turn_of_a_row_is_computed(
    shape: list[int], size: int, window: int, seed: int, part_shards: int
) -> None:
    layout = RowLayout(planned(shape, batch_rows=size, part_shards=part_shards))
    order = SourceOrder("a", layout, seed, window)
    n = layout.rows
    for epoch in range(2):
        rows, epochs = order.rows(epoch * n, (epoch + 1) * n)
        assert sorted(rows.tolist()) == list(range(n))
        assert set(epochs.tolist()) == {epoch}
        for place in range(0, n, max(1, n // 7)):
            assert order.turn_of(int(rows[place]), epoch) == epoch * n + place
            assert order.rows(epoch * n + place, epoch * n + place + 1)[0] == rows[place]


def test_epochs_seeds_and_names_have_independent_orders() -> None:
    layout = RowLayout(planned([64] * 200, batch_rows=8))
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
def test_the_ranks_share_one_global_batch_at_any_world_size(size: int) -> None:
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
    order = SampleOrder(mixture(), 3)
    used: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    for step in range(QUOTA_PERIOD // 4):
        draw = order.draw(step)
        tasks[draw.task] += 1
        names = Counter(i.partition(":")[0] for i in draw.ids)
        used += names
        assert set(names) <= ({"dialogues"} if draw.task == "text" else {"digits", "emoji"})
    steps = QUOTA_PERIOD // 4
    assert tasks["text"] == pytest.approx(0.15 * steps, abs=1)
    total = 24 * steps
    assert used["digits"] == pytest.approx(0.60 * total, abs=25)
    assert used["emoji"] == pytest.approx(0.25 * total, abs=25)


def test_mixed_sources_are_each_passed_evenly() -> None:
    order = SampleOrder(mixture(), 3)
    seen: Counter[tuple[str, int]] = Counter()
    for step in range(40):
        draw = order.draw(step)
        seen.update(zip(draw.ids, draw.epochs.tolist(), strict=True))
    assert set(seen.values()) == {1}  # no sample twice in an epoch
    complete = {(f"digits:{row}", 0) for row in range(95)}
    assert complete <= set(seen)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_quotas_are_exact_and_spread(weights: list[float]) -> None:
    quotas = exact_quotas(weights, [str(i) for i in range(len(weights))])
    assert sum(quotas) == QUOTA_PERIOD
    for weight, quota in zip(weights, quotas, strict=True):
        assert quota == pytest.approx(weight / sum(weights) * QUOTA_PERIOD, abs=1)
    turns = interleave(quotas)
    for k, quota in enumerate(quotas):
        assert (turns == k).sum() == quota
        # Evenly spread: any prefix has its share, to within one turn a source.
        count = np.cumsum(turns == k)
        ideal = np.arange(1, QUOTA_PERIOD + 1) * quota / QUOTA_PERIOD
        assert np.abs(count - ideal).max() <= len(weights)


@given(st.integers(0, 5 * QUOTA_PERIOD))
@settings(max_examples=30, deadline=None)
def test_turns_before_a_slot_are_computed(slot: int) -> None:
    turns = Interleaving((7059, 2941))
    counted = np.bincount(turns.turns(0, slot), minlength=2)
    assert counted.tolist() == turns.before(slot).tolist()


def test_a_weight_too_small_for_an_exact_share_is_refused() -> None:
    with pytest.raises(ValueError, match="'b' has weight 1e-06"):
        exact_quotas([1.0, 1e-6], ["a", "b"])


def test_incompatible_sources_are_refused_with_both_values() -> None:
    other = planned([10])
    object.__setattr__(other, "tokenizer_sha256", "other")
    with pytest.raises(ValueError, match="tokenizer_sha256 is tokenizer and other"):
        Mixture((Source("a", planned([10]), 1), Source("b", other, 1)))


def staged(*stages: tuple[int, dict[str, float]]) -> Mixture:
    shapes = {"digits": [50, 37, 8], "emoji": [11, 30], "extra": [17]}
    sources = [Source(n, planned(s, part_shards=1)) for n, s in shapes.items()]
    sources.append(Source("dialogues", planned([29], images=False)))
    used = {name for _, weights in stages for name in weights}
    return Mixture(
        tuple(s for s in sources if s.name in used),
        global_batch=8,
        stages=tuple(MixtureStage(step, tuple(weights.items())) for step, weights in stages),
    )


FIRST = (0, {"digits": 0.6, "emoji": 0.2, "dialogues": 0.2})
SECOND = (37, {"digits": 0.1, "extra": 0.7, "dialogues": 0.2})
THIRD = (90, {"emoji": 1.0})


def test_a_mixture_stage_continues_from_what_was_consumed() -> None:
    before, after = SampleOrder(staged(FIRST), 3), SampleOrder(staged(FIRST, SECOND, THIRD), 3)
    for step in range(37):
        assert after.draw(step).ids == before.draw(step).ids
    seen: Counter[tuple[str, int]] = Counter()
    counts: Counter[str] = Counter()
    for step in range(130):
        draw = after.draw(step)
        seen.update(zip(draw.ids, draw.epochs.tolist(), strict=True))
        counts.update(i.partition(":")[0] for i in draw.ids)
        names = {i.partition(":")[0] for i in draw.ids}
        allowed = next(w for start, w in (THIRD, SECOND, FIRST) if step >= start)
        assert names <= allowed.keys()
        assert after.consumed(step + 1).tolist() == [counts[s.name] for s in after.mixture.sources]
    assert set(seen.values()) == {1}  # no sample twice in an epoch, across stages
    for source in after.mixture.sources:
        rows, n = source.manifest.rows, counts[source.name]
        whole = {(f"{source.name}:{r}", e) for e in range(n // rows) for r in range(rows)}
        assert whole <= seen.keys()


def test_shares_are_exact_in_each_mixture_stage() -> None:
    order = SampleOrder(staged(FIRST, (10_000, SECOND[1])), 3)
    names = [s.name for s in order.mixture.sources]
    first = dict(zip(names, order.consumed(10_000).tolist(), strict=True))
    assert first == {"digits": 48_000, "emoji": 16_000, "dialogues": 16_000, "extra": 0}
    both = dict(zip(names, order.consumed(20_000).tolist(), strict=True))
    assert both == {"digits": 56_000, "emoji": 16_000, "dialogues": 32_000, "extra": 56_000}


@pytest.mark.parametrize(("images_per_row", "texts_per_row"), [(1, 1), (1, 3), (2, 1)])
def test_the_steps_of_a_sample_are_found_without_drawing_them(
    images_per_row: int, texts_per_row: int
) -> None:
    per_row = {"images_per_row": images_per_row, "texts_per_row": texts_per_row}
    mixture = replace(staged(FIRST, SECOND, THIRD), **per_row)
    order = SampleOrder(mixture, 3)
    used: dict[str, list[tuple[int, int]]] = {}
    for step in range(120):
        draw = order.draw(step)
        assert len(draw.ids) == 8 * (texts_per_row if draw.task == "text" else images_per_row)
        for sample, epoch in zip(draw.ids, draw.epochs.tolist(), strict=True):
            used.setdefault(sample, []).append((step, epoch))
    for place, source in enumerate(mixture.sources):
        for row in range(source.manifest.rows):
            found = list(order.uses(place, row, 120))
            assert found == used.get(f"{source.name}:{row}", [])


def test_the_order_of_sources_in_the_configuration_does_not_matter() -> None:
    one = staged(FIRST)
    other = staged((0, dict(reversed(FIRST[1].items()))))
    other = replace(other, sources=tuple(reversed(other.sources)))
    assert SampleOrder(one, 3).draw(11).ids == SampleOrder(other, 3).draw(11).ids


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(5, FIRST[1])], r"stages begin at steps \[5\]"),
        ([FIRST, SECOND, SECOND], r"steps \[0, 37, 37\]"),
        ([(0, {"digits": -1.0})], "weight of 'digits' from step 0 on is -1"),
    ],
)
def test_invalid_mixture_stages_are_refused(stages, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        staged(*stages)


def test_the_sample_order_of_earlier_versions_is_unchanged() -> None:
    stages = (
        MixtureStage(0, (("pictures", 0.75), ("talk", 0.25))),
        MixtureStage(21, (("talk", 0.5), ("pictures", 0.5))),
    )
    sources = (
        Source("pictures", planned([50, 21]), 0.75),
        Source("talk", planned([40], images=False), 0.25),
    )
    order = SampleOrder(Mixture(sources, global_batch=24, shuffle_window=2, stages=stages), 7)
    digest = ""
    for step in range(60):
        digest = extend_digest(digest, order.draw(step).ids)
    # Of the first version with mixture stages; source names are part of the digest.
    assert digest == "19caa3358671946cb75a11ee4e42965c"
    assert sample_keys(["a:0", "bench:12345"]).tolist() == [
        2513208124562855417,
        3309121811503889601,
    ]
