"""The one door to DeepSpeed, and what has to be done differently from how it does it (0.19.8)."""

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

# Its autotuner, which nothing here uses, imports mlflow on every rank where it is installed. That
# takes as long as the rest of its import, and would happen before `mdm.utils.mlflow_run` has
# switched telemetry off.
_hidden = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
import deepspeed  # noqa: E402
from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import GatheredParameters  # noqa: E402
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402

if _hidden:
    del sys.modules["mlflow"]

__all__ = ["DeepSpeedZeroConfig", "GatheredParameters", "deepspeed", "set_z3_leaf_modules"]


def init_distributed(timeout: timedelta) -> None:
    """Join the process group of the environment, or the one that is there, without noise."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed still calls these by their former names, several times a step.
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)
    # The last collectives are written down when a rank hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # The shared-memory op serves inference alone (`inference_all_reduce`), takes 40 s to compile
    # and leaves 66 MiB in /dev/shm for every killed rank: training does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)


@contextmanager
def partitioned_when_made(
    classes: Sequence[type[nn.Module]], values: dict[str, Any]
) -> Iterator[None]:
    """Modules of `classes` made inside are partitioned at once: no rank holds all of them whole.

    DeepSpeed's own context partitions every module at the end of its `__init__`, so that what a
    parent then writes into its children's parameters is lost without a word. Here a class writes
    its initial values undisturbed, children and all.
    """
    former = {cls: cls.__init__ for cls in classes}
    first: list[nn.Parameter] = []  # knows how the others are partitioned

    def making(cls: type[nn.Module], init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def made(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            params = list(self.parameters())
            if first:
                first[0].convert_to_zero_parameters(param_list=params)  # type: ignore[attr-defined]
            else:
                deepspeed.zero.Init(module=self, config_dict_or_path=values)
                first.extend(params[:1])

        return made

    try:
        for cls, init in former.items():
            cls.__init__ = making(cls, init)  # type: ignore[method-assign]
        yield
    finally:
        for cls, init in former.items():
            cls.__init__ = init  # type: ignore[method-assign]


class NormWatch:
    """Tells the global norm of the last step's gradient, and refuses a step above a limit.

    DeepSpeed skips a step on all ranks where the global norm is not finite; so one above `limit` is
    reported as infinite. The optimizer computes it on all ranks alike, and where it finds a
    gradient that is not finite it may ask for no norm.
    """

    def __init__(self, optimizer: Any, stage: int) -> None:
        self.norm, self.limit = 0.0, math.inf
        name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        compute = getattr(optimizer, name)

        def watched() -> Any:
            computed = compute()
            norm = combine_grad_norm_groups(computed) if stage == 3 else computed
            self.norm = float(norm)
            if self.norm <= self.limit:
                return computed
            infinite = torch.full_like(norm, math.inf)
            return [infinite] if stage == 3 else infinite

        setattr(optimizer, name, watched)

    def begin(self, limit: float) -> None:
        """Before a step: refuse a norm above `limit`."""
        self.norm, self.limit = math.inf, limit


def forget_gradients(optimizer: Any) -> None:
    """Zero the gradients that ZeRO-3 keeps of parameters that a step does not use.

    Such a parameter keeps the gradient of its last use in the partition buffers, and the optimizer
    would apply it again: a step of text alone would move the image's parameters along a stale
    direction.
    """
    optimizer.grad_partitions_flat_buffer.zero_()
    if optimizer.offload_optimizer:
        optimizer.reset_cpu_buffers()
        for flat in optimizer.fp32_partitioned_groups_flat:
            if flat.grad is not None:
                flat.grad.zero_()


def make_persistent_visible(optimizer: Any) -> None:
    """Gather ZeRO-3's small, persistent parameters now.

    They stay gathered, but only from their first use inside a hook on, and a module may be asked
    for a table outside `forward`.
    """
    optimizer.checkpoint_event_epilogue()
