from pathlib import Path

import pytest

from tests.helpers import run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ("cpu.json", 2),
        ("cpu_small_model.json", 2),
        ("zero3.json", 3),
        ("zero2.json", 2),
        ("zero3_multinode.json", 2),
    ],
)
def test_sharded_weights_ema_and_skipped_steps_equal_their_gathered_reference(
    config, ranks, tmp_path
):
    """fp32 parameters of the scan, equal EMA, gradients and skipped steps; see `engine_job`."""
    job = Path(__file__).with_name("engine_job.py")
    code, output = run_ranks(job, ranks, config, str(tmp_path))
    assert code == 0, output
