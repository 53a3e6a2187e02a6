import json

import pytest

from mdm.data.blocklist import LATER, substituted
from mdm.data.order import SampleOrder
from mdm.utils.ranks import World
from tests.unit.data.test_loader import Loader, local, take  # noqa: F401 - a fixture
from tests.unit.data.test_order import mixture


def test_substitutes_take_the_places_of_blocked_samples_and_the_others_stay():
    order = SampleOrder(mixture(), seed=3)
    for step in range(12):
        draw = order.draw(step)
        bad = frozenset(draw.ids[:5])
        changed = substituted(order, step, bad)
        assert not bad & set(changed.ids)
        assert changed.task == draw.task
        for i, name in enumerate(draw.ids):  # a batch may hold a sample twice
            if name in bad:
                assert changed.epochs[i] >= LATER
            else:
                assert (changed.ids[i], changed.epochs[i]) == (name, draw.epochs[i])
        places = zip(changed.sources, changed.rows, strict=True)
        assert [f"{order.mixture.sources[s].name}:{r}" for s, r in places] == changed.ids
        again = substituted(SampleOrder(mixture(), seed=3), step, bad)
        assert again.ids == changed.ids
    assert substituted(order, 1, frozenset()).ids == order.draw(1).ids


def test_a_blocklist_without_substitutes_is_an_error():
    order = SampleOrder(mixture(), seed=0)
    text = next(s for s in range(50) if order.draw(s).task == "text")
    everything = frozenset(i for s in range(2000) for i in order.draw(s).ids)
    with pytest.raises(
        ValueError, match="are on the blocklist, and so are all possible substitutes"
    ):
        substituted(order, text, everything)


def test_loaders_agree_at_any_number_of_ranks_and_after_a_resume(local):  # noqa: F811
    """Two ranks and one; with a blocklist given while running, and one from a restored state."""

    def loader(world: World) -> Loader:
        return Loader(local, 5, world, caption_length=8, dialogue_length=12)

    with loader(World()) as one, loader(World(0, 2)) as a, loader(World(1, 2)) as b:
        bad = [i for s in (2, 3) for i in one.sample_ids(s)[::3]]
        for each in (one, a, b):
            take(each, 2)
            each.block(bad)
        state = json.loads(json.dumps(one.state_dict()))
        whole = take(one, 6)
        shares = list(zip(take(a, 6), take(b, 6), strict=True))
        assert [(*x.ids, *y.ids) for x, y in shares] == [w.ids for w in whole]
        assert not {i for w in whole for i in w.ids} & set(bad)
        assert one.order_digest == a.order_digest == b.order_digest
    with loader(World()) as resumed:
        resumed.load_state_dict(state)
        assert [w.ids for w in take(resumed, 6)] == [w.ids for w in whole]
        assert resumed.order_digest == one.order_digest
        assert resumed.blocklist == frozenset(bad)
