import gc

import numpy as np
import pyarrow as pa
import pytest
import torch

from mdm.storage import buffers

SIZE = 200_000


@pytest.fixture(autouse=True)
def _no_memory_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_free", {})


def address(array: np.ndarray) -> int:  # type: ignore[type-arg]
    return int(array.__array_interface__["data"][0])


def test_memory_is_reused_once_nothing_refers_to_it() -> None:
    first = buffers.take(SIZE)
    at = address(first)
    assert address(buffers.take(SIZE)) != at
    holders = [
        first[100:200],
        first.data[5:],
        torch.from_numpy(first[:64].view(np.int16)),
        pa.py_buffer(first.data).slice(3),
    ]
    del first
    while holders:
        kept = [buffers.take(SIZE) for _ in range(3)]
        assert at not in map(address, kept)
        holders.pop()
        del kept
        gc.collect()
    assert at in [address(a) for a in [buffers.take(SIZE) for _ in range(9)]]


def test_similar_sizes_share_memory_and_small_ones_are_not_kept() -> None:
    at = address(buffers.take(SIZE))
    again = buffers.take(SIZE - 1000)
    assert (address(again), len(again)) == (at, SIZE - 1000)
    assert address(buffers.take(2 * SIZE)) != at
    assert len(buffers.take(0)) == 0


def test_unused_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SPARE", 3 * SIZE)
    held = [buffers.take(SIZE) for _ in range(9)]
    held.clear()
    (free,) = buffers._free.values()
    assert 1 <= len(free) <= 3
