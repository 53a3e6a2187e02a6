"""Noise levels, noise, masks, loss and gradients do not depend on the number of ranks."""

import pytest

from tests.helpers import ROOT, run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_compute_the_same_as_one(ranks):
    code, output = run_ranks(ROOT / "tests/distributed/objective_job.py", ranks)
    assert code == 0, output
