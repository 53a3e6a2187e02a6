"""Ten billion samples: neither fetches nor memory grow with their number."""

import json
import tracemalloc
from pathlib import Path

import numpy as np

from mdm.data import resume
from mdm.data.manifest import Manifest
from mdm.data.mixture import Mixture, Source
from mdm.data.order import POOL_PARTS, SampleOrder, layout_of
from tests.data_sets import vast

ROWS = 10**10


def order(uri: Path) -> SampleOrder:
    layout_of.cache_clear()  # as in a new process
    manifest = Manifest.load(str(uri))
    assert manifest.shards.fetched == 0
    return SampleOrder(Mixture((Source("web", manifest),), global_batch=256), 5)


def test_ten_billion_samples_are_opened_drawn_resumed_and_traced_by_arithmetic(
    tmp_path: Path,
) -> None:
    vast(str(tmp_path), ROWS)
    deep = int(3.9 * ROWS) // 256
    tracemalloc.start()
    first = order(tmp_path)
    fetched = first.sources[0].layout.manifest.shards
    draw = first.draw(0)
    assert len(set(draw.ids)) == 256
    # Steps drawn together begin in one shuffle pool and may end in the next.
    assert fetched.fetched <= 2 * POOL_PARTS
    state = json.dumps(resume.state_dict(first, {}, deep, "digest"))

    second = order(tmp_path)
    resume.check(json.loads(state), second, {})
    assert second.sources[0].layout.manifest.shards.fetched == 0
    there = second.draw(deep)
    assert second.sources[0].layout.manifest.shards.fetched <= 2 * POOL_PARTS
    assert set(there.epochs.tolist()) == {3}
    uses = list(second.uses(0, int(there.rows[7]), deep + 1))
    assert [epoch for _, epoch in uses] == [0, 1, 2, 3]
    assert uses[-1] == (deep, 3)
    for step, epoch in uses[:-1]:
        again = second.draw(step)
        place = again.rows.tolist().index(int(there.rows[7]))
        assert again.epochs[place] == epoch

    for step in range(deep + 1, deep + 100):
        second.draw(step)
    parts = second.sources[0].layout.manifest.shards
    pools = 5  # of the deep step, of three earlier epochs, and one more in case a pool ends there
    assert parts.fetched <= pools * POOL_PARTS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20  # an array of one byte a sample would be 9.3 GiB
    assert np.unique(there.rows).size == 256
