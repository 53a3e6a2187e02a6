import json

import pytest

from mdm.data.blocklist import LATER, substituted
from mdm.data.order import SampleOrder
from mdm.utils.ranks import World
from tests.unit.data.test_loader import Loader, local, take  # noqa: F401 - a fixture
from tests.unit.data.test_order import mixture


def test_others_take_the_places_and_the_rest_stays():
    order = SampleOrder(mixture(), seed=3)
    for step in range(12):
        draw = order.draw(step)
        bad = frozenset(draw.ids[:5])
        found = substituted(order, step, bad)
        assert not bad & set(found.ids)
        assert found.task == draw.task
        for i, name in enumerate(draw.ids):  # a small set may stand in a batch more than once
            if name in bad:
                assert found.epochs[i] >= LATER
            else:
                assert (found.ids[i], found.epochs[i]) == (name, draw.epochs[i])
        places = zip(found.sources, found.rows, strict=True)
        assert [f"{order.mixture.sources[s].name}:{r}" for s, r in places] == found.ids
        again = substituted(SampleOrder(mixture(), seed=3), step, bad)
        assert again.ids == found.ids
    assert substituted(order, 1, frozenset()).ids == order.draw(1).ids


def test_no_samples_left_is_an_error():
    order = SampleOrder(mixture(), seed=0)
    text = next(s for s in range(50) if order.draw(s).task == "text")
    everything = frozenset(i for s in range(2000) for i in order.draw(s).ids)
    with pytest.raises(ValueError, match="are on the blocklist, and so are all possible substitutes"):
        substituted(order, text, everything)


def test_loaders_agree_whatever_their_number_and_when_they_were_told(local):  # noqa: F811
    """Two ranks and one; told before, and resumed from a state that was told."""

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
