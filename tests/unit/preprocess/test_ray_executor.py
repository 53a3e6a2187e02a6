import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mdm.preprocess import ray_executor
from mdm.preprocess.ray_executor import GroupEncoder


@pytest.mark.parametrize(
    ("records", "most", "expected"),
    [
        (10_000, 3, 3),  # hours of work remain
        (10_000, 1, 1),  # no more than allowed
        (30, 3, 1),  # 10 s remain: another encoder would start too late
        (60, 3, 3),  # 40 s remain: two more are worth it
        (45, 3, 2),
    ],
)
def test_encoders_are_added_if_the_remaining_work_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, records: int, most: int, expected: int
) -> None:
    now = 100.0
    monkeypatch.setattr(ray_executor, "time", SimpleNamespace(perf_counter=lambda: now))
    unused: Any = None
    encoder = GroupEncoder(unused, unused, 1, start=object, encoders=most)
    encoder._records = records
    for _ in range(2):  # chunks of ten records take ten seconds; the first does not count
        encoder._finish(10)
        encoder._add_encoders()
        assert len(encoder._encoders) == (1 if now == 100 else expected)
        now += 10


def test_the_job_and_its_workers_without_a_network_start_without_torch() -> None:
    # An import of torch takes longer than many a data set, in each of Ray's processes.
    code = "import sys, pipelines.encode; print({'torch', 'diffusers'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr
