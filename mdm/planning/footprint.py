"""Bytes that a rank really holds: its part of the states, whole parameters, activations.

Tensors that share memory are counted once, under the first name.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdm.train.ema import EMA
from mdm.train.engine import Engine

STATES = ("parameters", "gradients", "optimizer", "ema", "buckets")  # "whole" comes on top


def held_bytes(engine: Engine, ema: EMA) -> dict[str, int]:
    """Bytes by name: `STATES` and `whole`.

    `parameters` are this rank's partitions (including the secondary ones of hpZ), `buckets` the
    gradients that wait to be reduced, `whole` the parameters that are whole at this moment. Call it
    between a backward pass and its step, but not in the first step, which makes Adam's moments.
    """
    zero, parameters = engine.zero, list[Any](engine.module.parameters())
    tensors: dict[str, list[Any]] = {  # and values that are not tensors
        "parameters": [],
        "optimizer": [
            *engine.shards.partitions(),
            *tree_leaves(list(zero.optimizer.state.values())),
        ],
        "ema": tree_leaves(vars(ema)),
        # Stage 2 keeps lists of this rank's averaged gradients, stage 3 views of one flat tensor.
        "gradients": tree_leaves(dict(zero.averaged_gradients)),
        "buckets": [],
        "whole": parameters,
    }
    if engine.stage == 3:
        shares = (t for p in parameters for t in (p.ds_tensor, p.ds_secondary_tensor))
        tensors["parameters"] = list(shares)
        tensors["gradients"].append(zero.grad_partitions_flat_buffer)
        tensors["gradients"] += [p.grad for p in zero.fp32_partitioned_groups_flat]
        tensors["buckets"] = [bucket.buffer for bucket in zero.ipg_buckets.values()]
    held, seen = dict.fromkeys(tensors, 0), set[int]()
    for name, group in tensors.items():
        for t in group:
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in seen:
                seen.add(storage._cdata)
                held[name] += storage.nbytes()
    return held


class ByteCount:
    """A number of bytes that grows while a model runs."""

    def __init__(self) -> None:
        self.bytes = 0


def count_gathered(engine: Engine, classes: Sequence[type[nn.Module]]) -> ByteCount:
    """Record the most bytes of parameters that ZeRO-3 has gathered when a `classes` module runs."""
    peak, params = ByteCount(), list(engine.module.parameters())

    def update_peak(module: nn.Module, inputs: Any) -> None:
        gathered = sum(p.numel() * p.element_size() for p in params)
        peak.bytes = max(peak.bytes, gathered)

    for module in engine.module.modules():
        if isinstance(module, tuple(classes)):
            module.register_forward_pre_hook(update_peak)
    return peak


@contextmanager
def saved_activations(module: nn.Module) -> Iterator[ByteCount]:
    """Count what autograd saves in here for backward; not parameters and buffers of `module`.

    Under ZeRO-3 a gathered parameter is recognised by the memory that it has at that moment.
    """
    saved, seen, kept = ByteCount(), set[int](), list[Any]()

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        tensors = (*module.parameters(), *module.buffers())
        own = {tensor.untyped_storage()._cdata for tensor in tensors}
        if storage._cdata not in own | seen:
            seen.add(storage._cdata)
            kept.append(storage)  # so that no other memory takes its address
            saved.bytes += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


class Live(TorchDispatchMode):
    """Counts the bytes of living tensors that were made inside: `now`, and at their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count its new tensors."""
        given = {s._cdata for s in self._storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage._cdata not in given and storage._cdata not in self._refs:
                self._count(storage, storage._cdata, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        def gone(_: Any) -> None:
            self.now -= size
            self._refs.pop(key, None)

        self._refs[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    @staticmethod
    def _storages(values: Any) -> list[torch.UntypedStorage]:
        return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]
