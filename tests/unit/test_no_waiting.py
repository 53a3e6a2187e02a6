"""A step never waits for its GPU: tried on the meta device, whose tensors have no values."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mdm.diffusion import schedule
from mdm.loss import Loss
from mdm.model import sequence
from tests.golden.test_losses import CONFIG, batch
from tests.unit.test_loss import two_images
from tests.unit.test_packed_samples import objective, packed

BATCHES = {
    "images": batch(0),
    "dialogue": two_images(),
    "text": batch(3),
    "packed texts": packed(),
    "packed images": packed(1),
}


class NoBlockingCopies(TorchDispatchMode):
    """Copies to the device do not wait; those from it fail anyway."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            device = kwargs.get("device") or "cpu"
            assert torch.device(device).type == "cpu" or kwargs.get("non_blocking"), args[0].shape
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def tables_without_values() -> Iterator[None]:
    """Tables and scan orders are copied once a process; drop those of the meta device."""
    yield
    schedule._tables.cache_clear()
    sequence.scan_order.cache_clear()


@pytest.mark.parametrize("kind", BATCHES)
def test_a_step_never_waits_for_its_device(kind: str) -> None:
    weights = dataclasses.replace(CONFIG.objective, p_self_condition=1.0)
    loss = Loss(dataclasses.replace(CONFIG, objective=weights))
    if kind.startswith("packed"):
        loss = objective(estimate=1.0).train()
    loss = loss.to("meta")
    loss(BATCHES[kind], 0)  # copies the tables
    with NoBlockingCopies():
        total: Tensor = loss(BATCHES[kind], 0).total
        total.backward()
    assert total.device.type == "meta"
