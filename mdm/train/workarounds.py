"""The only import of DeepSpeed, and work-arounds for its version 0.19.8, each with its reason.

When the pinned version changes, go through this file: each work-around names what to look for.
"""

import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

# DeepSpeed 0.19.8's autotuner, which is not used here, imports mlflow on every rank if it is
# installed. That doubles the import time, and happens before `mdm.utils.mlflow_run` has switched
# telemetry off.
_hidden = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
import deepspeed  # noqa: E402
from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import (  # noqa: E402
    GatheredParameters,
    ZeroParamStatus,
)
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402

if _hidden:
    del sys.modules["mlflow"]

__all__ = ["DeepSpeedZeroConfig", "GatheredParameters", "deepspeed", "set_z3_leaf_modules"]


def init_distributed() -> None:
    """Join the process group of the environment, or the present one, without log noise."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls these by their former names, several times a step.
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)
    # For the dump of the last collectives when a rank hangs: see `mdm.train.heartbeat`.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # DeepSpeed 0.19.8 compiles its shared-memory op, which only inference uses, for 40 s, and
    # leaves 66 MiB in /dev/shm for every killed rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=10)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)


def disable_autocast_cache() -> None:
    """Keep no cast copies of weights: see `mdm.utils.precision.autocast`.

    DeepSpeed 0.19.8 enters autocast without a `cache_enabled` argument and inherits this setting.
    """
    torch.set_autocast_cache_enabled(False)


@contextmanager
def partition_on_creation(
    classes: Sequence[type[nn.Module]], values: dict[str, Any]
) -> Iterator[None]:
    """Partition modules of `classes` as soon as they are created, so no rank holds all of them.

    DeepSpeed 0.19.8's own context, `zero.Init`, partitions every module at the end of its
    `__init__`: values that a parent then writes into its children's parameters are silently lost.
    Here a module is partitioned with its children once its own `__init__` has ended, which is why
    the `__init__` of `classes` is replaced.
    """
    former = {cls: cls.__init__ for cls in classes}
    first: list[nn.Parameter] = []  # has the method that partitions the others

    def partitioning(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def init_and_partition(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            params = list(self.parameters())
            if first:
                first[0].convert_to_zero_parameters(param_list=params)  # type: ignore[attr-defined]
            else:
                deepspeed.zero.Init(module=self, config_dict_or_path=values)
                first.extend(params[:1])

        return init_and_partition

    try:
        for cls, init in former.items():
            cls.__init__ = partitioning(init)  # type: ignore[method-assign]
        yield
    finally:
        for cls, init in former.items():
            cls.__init__ = init  # type: ignore[method-assign]


class NormWatch:
    """Records the global gradient norm of the last step, and prevents a step above a limit.

    DeepSpeed 0.19.8 has no hook between the norm and the update, but it skips the update on all
    ranks if the norm is not finite: a norm above `limit` is therefore reported to it as infinite.
    If it finds a gradient that is not finite, it may not compute a norm at all.
    """

    def __init__(self, optimizer: Any, stage: int) -> None:
        self.norm, self.limit = 0.0, math.inf
        name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        compute = getattr(optimizer, name)

        def compute_and_check() -> Any:
            computed = compute()
            norm = combine_grad_norm_groups(computed) if stage == 3 else computed
            self.norm = float(norm)
            if self.norm <= self.limit:
                return computed
            infinite = torch.full_like(norm, math.inf)
            return [infinite] if stage == 3 else infinite

        setattr(optimizer, name, compute_and_check)

    def begin(self, limit: float) -> None:
        """Before a step: set the largest norm that updates weights."""
        self.norm, self.limit = math.inf, limit


def forget_gradients(optimizer: Any) -> None:
    """Zero the gradients that ZeRO-3 keeps for parameters that a step does not use.

    In DeepSpeed 0.19.8 the partition buffers keep the gradient of a parameter's last use, and the
    optimizer would apply it again: a text-only step would move the image parameters along a stale
    gradient.
    """
    optimizer.grad_partitions_flat_buffer.zero_()
    if optimizer.offload_optimizer:
        optimizer.reset_cpu_buffers()
        for flat in optimizer.fp32_partitioned_groups_flat:
            if flat.grad is not None:
                flat.grad.zero_()


class PersistentParams:
    """ZeRO-3's small, persistent parameters, which stay whole from step to step.

    DeepSpeed 0.19.8 gathers each in a collective of its own after a step. After loading it leaves
    whole what was whole, with the values of before. In a step whose order of modules is new, as
    after one of another task, it releases and gathers them with every module.
    """

    def __init__(self, optimizer: Any) -> None:
        self._params = list(optimizer.persistent_parameters)
        optimizer.persistent_parameters = []  # it need not gather them as well
        for param in self._params:
            param.is_external_param = True  # no module releases it

    def gather(self) -> None:
        """Make them whole from their partitions, in one collective; all ranks must call."""
        if not self._params:
            return
        group = self._params[0].ds_process_group
        own = torch.cat([p.ds_tensor for p in self._params])
        parts = own.new_empty(torch.distributed.get_world_size(group), own.numel())
        torch.distributed.all_gather_into_tensor(parts.view(-1), own, group)
        sizes = [p.ds_tensor.ds_numel for p in self._params]
        for param, part in zip(self._params, parts.split(sizes, 1), strict=True):
            param.data = part.reshape(-1)[: param.ds_numel].view(param.ds_shape)
            param.ds_status = ZeroParamStatus.AVAILABLE
