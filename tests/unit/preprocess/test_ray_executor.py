from types import SimpleNamespace
from typing import Any

import pytest

from mdm.preprocess import ray_executor as encode_on_ray
from mdm.preprocess.ray_executor import GroupEncoder


@pytest.mark.parametrize(
    ("records", "most", "expected"),
    [
        (10_000, 3, 3),  # hours ahead
        (10_000, 1, 1),  # no more than asked for
        (30, 3, 1),  # 10 s ahead: another one would come too late
        (60, 3, 3),  # 40 s ahead: two more are worth it
        (45, 3, 2),
    ],
)
def test_encoders_grow_by_the_work_ahead(
    monkeypatch: pytest.MonkeyPatch, records: int, most: int, expected: int
) -> None:
    now = 100.0
    monkeypatch.setattr(encode_on_ray, "time", SimpleNamespace(perf_counter=lambda: now))
    nothing: Any = None
    encoder = GroupEncoder(nothing, nothing, 1, start=object, encoders=most)
    encoder._records = records
    for _ in range(2):  # chunks of ten records, ten seconds each; the first one counts not
        encoder._done(10)
        encoder._add_encoders()
        assert len(encoder._encoders) == (1 if now == 100 else expected)
        now += 10
    assert len(encoder._pending) == expected
