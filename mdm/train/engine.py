"""The training engine: ranks, ZeRO, precision, sharded state."""

import gc
import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdm.checkpoint.shards import Shards
from mdm.config import Config
from mdm.train.deepspeed_config import load_deepspeed_config
from mdm.train.workarounds import (
    NormWatch,
    PersistentParams,
    deepspeed,
    disable_autocast_cache,
    forget_gradients,
    init_distributed,
    partition_on_creation,
    set_z3_leaf_modules,
)
from mdm.utils.memory import keep_freed_memory
from mdm.utils.ranks import World


def start_ranks(threads: int = 0) -> World:
    """Join the process group that the launcher describes (or a group of one) and pin CPU threads.

    The same number of threads on every attempt is part of bit-identical resume: it fixes the
    order of sums inside matrix products. `threads` 0 shares the cores among a node's ranks.
    """
    world = World.from_env()
    if "MASTER_ADDR" not in os.environ and world.size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // per_node))
    init_distributed()
    if device_of_rank().type == "cpu":
        keep_freed_memory()
    return world


def pretend_ranks(size: int) -> World:
    """Be one rank of `size` in a single process, whose collectives return its own data.

    On torch's `fake` group an all-gather repeats this rank's tensor, a reduce-scatter returns its
    own slice and a broadcast does nothing: shapes, buffers and bytes are those of the real run.
    The rank is 0, because in DeepSpeed all others check what rank 0 broadcasts.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    init_distributed()
    return World(0, size)


def device_of_rank() -> torch.device:
    """The device that this rank trains on."""
    return torch.device(deepspeed.accelerator.get_accelerator().current_device_name())


def stop_ranks() -> None:
    """Leave the process group; call when no engine is in use any more.

    Objects that refer to the group are collected first: gloo's threads must have ended when the
    interpreter exits, or they abort the process.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
    gc.collect()


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights of projections, convolutions and embeddings decay.

    Biases, norms, `A_log`, `D`, `dt_bias`, positions, learned tokens and parameters marked
    `_no_weight_decay` do not. The role follows from the name and not from the shape, because a
    mixer's parameters have a leading scan axis.
    """
    if weight_decay == 0:
        return [{"params": list(module.parameters()), "weight_decay": 0.0}]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in module.named_parameters():
        shape = getattr(p, "ds_shape", p.shape)  # of the whole, if ZeRO-3 has partitioned it
        is_matrix = name.rpartition(".")[2] == "weight" and len(shape) >= 2
        groups[is_matrix and not getattr(p, "_no_weight_decay", False)].append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in groups.items()
        if params
    ]


class Engine:
    """A module under ZeRO with AdamW: forward, backward, step, and its sharded fp32 state.

    `make_module` is called under the run's seed. ZeRO-3 gathers each module of `leaf_classes` as a
    whole, with one hook instead of one for each of its children.
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        config: Config,
        world: World,
        leaf_classes: Sequence[type[nn.Module]] = (),
    ) -> None:
        values = load_deepspeed_config(config, world.size)
        zero = values["zero_optimization"]
        disable_autocast_cache()
        torch.manual_seed(config.seed)
        with partition_on_creation(leaf_classes if zero["stage"] == 3 else (), values):
            module = make_module()
        present = [c for c in leaf_classes if any(isinstance(m, c) for m in module.modules())]
        if zero["stage"] == 3 and present:
            set_z3_leaf_modules(module, present)
        train = config.train
        settings: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2)}
        groups = decay_groups(module, train.weight_decay)
        optimizer: torch.optim.Optimizer
        if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=values)
        self.module: nn.Module = self._engine.module  # partitioned under ZeRO-3
        self.world, self.stage = world, int(zero["stage"])
        self.zero = self._engine.optimizer  # DeepSpeed's ZeRO optimizer
        self._norm = NormWatch(self.zero, self.stage)
        self.device: torch.device = torch.device(self._engine.device)
        self.shards = Shards(self.module, self.zero, self.stage, world)
        self._persistent: PersistentParams | None = None
        if self.stage == 3:
            self._persistent = PersistentParams(self.zero)
            self._persistent.gather()

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping."""
        return self._norm.norm

    def forward(self, *inputs: Any) -> Any:
        """The module's output, in the run's precision."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, averaged over the ranks and partitioned."""
        if self.stage == 3:
            forget_gradients(self.zero)
        self._engine.backward(loss)

    def step(self, rate: float, norm_limit: float = math.inf) -> None:
        """Clip, and update this rank's partition with learning rate `rate`.

        Nothing is updated if the gradient norm is not finite or above `norm_limit`.
        """
        for group in self.zero.param_groups:
            group["lr"] = rate
        self._norm.begin(norm_limit)
        self._engine.step()
        if self._persistent:
            self._persistent.gather()

    @property
    def was_step_applied(self) -> bool:
        """Whether the last `step` changed parameters."""
        return bool(self._engine.was_step_applied())

    def buffers(self) -> list[Tensor]:
        """Copies of the module's buffers, for `restore_buffers`."""
        return [b.detach().clone() for b in self.module.buffers()]

    def restore_buffers(self, values: Sequence[Tensor]) -> None:
        """Restore what `buffers` returned."""
        for buffer, value in zip(self.module.buffers(), values, strict=True):
            buffer.copy_(value)

    def restored(self, optimizer_steps: int) -> None:
        """Continue from the state that was written into `shards.live()`; all ranks must call."""
        self.shards.adopt(optimizer_steps)
        if self._persistent:
            self._persistent.gather()
