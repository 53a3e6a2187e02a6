"""Levels, noise, masks, loss and gradients are those of one rank on any number of them."""

import pytest

from tests.helpers import ROOT, run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_compute_what_one_does(ranks):
    code, output = run_ranks(ROOT / "tests/distributed/objective_job.py", ranks)
    assert code == 0, output
