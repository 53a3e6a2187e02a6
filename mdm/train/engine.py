"""The one door to DeepSpeed: ranks, ZeRO, precision, sharded state.

The JSON owns ZeRO, offload and precision; `Config` owns batch, clipping and rate. A key on the
wrong side is refused, so that no knob has two owners.
"""

import gc
import io
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import set_z3_leaf_modules
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from mdm.config import Config
from mdm.dist import World
from mdm.train.state import RunError

ALLOWED = ("zero_optimization", "torch_autocast", "aio", "communication_data_type", "comms_logger")
OWNED_BY_CONFIG = {
    "train_batch_size": "--data.global_batch",
    "train_micro_batch_size_per_gpu": "--data.global_batch",
    "gradient_accumulation_steps": "--data.global_batch",
    "gradient_clipping": "--train.grad_clip",
    "optimizer": "--train.lr, --train.beta1, --train.beta2, --train.weight_decay",
    "scheduler": "--train.warmup, --train.decay",
    "seed": "--seed",
    "bf16": "torch_autocast in the same file, which keeps parameters in fp32",
    "fp16": "torch_autocast in the same file, which keeps parameters in fp32",
}


def load_deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the JSON of `train.deepspeed` plus what `config` owns.

    Raises RunError for a missing or malformed file, a key that `config` owns, an unknown key, a
    ZeRO stage other than 2 or 3, and a batch that the ranks cannot share evenly.
    """
    path = Path(config.train.deepspeed)
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise RunError(f"--train.deepspeed {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"--train.deepspeed {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"--train.deepspeed {path} holds a {type(values).__name__}, not an object")
    for key in values:
        if key in OWNED_BY_CONFIG:
            raise RunError(
                f"{path} sets {key!r}, which is owned by {OWNED_BY_CONFIG[key]}; remove it"
            )
        if key not in ALLOWED:
            raise RunError(f"{path} sets unknown key {key!r}; it may hold {', '.join(ALLOWED)}")
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in (2, 3):
        raise RunError(f"{path}: zero_optimization.stage is {stage!r}; the engine supports 2 and 3")
    if config.data.global_batch % world_size:
        raise RunError(
            f"data.global_batch {config.data.global_batch} is not a multiple of {world_size} ranks"
        )
    return values | {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.grad_clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def start_ranks(threads: int = 0, timeout: timedelta = timedelta(minutes=10)) -> World:
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
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed still calls these by their former names, several times a step.
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)
    # The shared-memory op serves inference alone (`inference_all_reduce`), takes 40 s to compile
    # and leaves 66 MiB in /dev/shm for every killed rank: training does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return world


def stop_ranks() -> None:
    """Leave the process group; call when no engine is in use any more.

    What still refers to the group is collected first: gloo's threads must have ended when the
    interpreter does, or they abort the process.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
    gc.collect()


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; vectors, scalars and `_no_weight_decay` never do."""
    if weight_decay == 0:
        return [{"params": list(module.parameters()), "weight_decay": 0.0}]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in module.parameters():
        groups[p.dim() >= 2 and not getattr(p, "_no_weight_decay", False)].append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in groups.items()
        if params
    ]


class Engine:
    """A module under ZeRO with AdamW: forward, backward, step, save, load, and its sharded fp32.

    `make_module` is called under the run's seed. `leaf_classes` are gathered as one unit, so that
    ZeRO-3 runs one hook for each of them instead of one for each of their children.
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
        # Autocast would keep a cast copy of every weight until the forward ends, which undoes
        # ZeRO-3's saving; and a copy made by an earlier pass gets its gradient after ZeRO-3 has
        # freed the weight, which fails. DeepSpeed's autocast inherits this setting.
        torch.set_autocast_cache_enabled(False)
        torch.manual_seed(config.seed)
        module = make_module()
        present = [c for c in leaf_classes if any(isinstance(m, c) for m in module.modules())]
        if zero["stage"] == 3 and present:
            set_z3_leaf_modules(module, present)
        train = config.train
        settings: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2)}
        groups = decay_groups(module, train.weight_decay)
        optimizer: torch.optim.Optimizer
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=values)
        self.world, self.stage = world, int(zero["stage"])
        self.device: torch.device = torch.device(self._engine.device)
        self._make_persistent_visible()

    @property
    def module(self) -> nn.Module:
        """The module itself; under ZeRO-3 its parameters may be partitioned."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, *inputs: Any) -> Any:
        """The module's output under the JSON's precision."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, reduced over the ranks and partitioned."""
        if self.stage == 3:
            self._forget_gradients()
        self._engine.backward(loss)

    def step(self, rate: float) -> None:
        """Clip, and update this rank's partition at learning rate `rate`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()

    @property
    def was_step_applied(self) -> bool:
        """Whether the last `step` changed parameters: false where a gradient was not finite."""
        return bool(self._engine.was_step_applied())

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def fp32_partitions(self) -> list[Tensor]:
        """This rank's flat fp32 master weights, live, one tensor an optimizer sub-group."""
        optimizer = self._engine.optimizer
        flat = (
            optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
        return [p.data for p in flat]

    def save(self, folder: Path) -> None:
        """Write every rank's ZeRO state into `folder`; all ranks must call."""
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote at the same world size; all ranks must call."""
        loaded, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise RunError(f"{folder} holds no DeepSpeed checkpoint")
        self._make_persistent_visible()

    def save_alike(self, folder: Path, main: Path, partitions: Sequence[Tensor]) -> None:
        """Write `partitions` into `folder` as the fp32 weights of a ZeRO checkpoint like `main`.

        The layout is DeepSpeed's own, so that its offline tools read both. Buffers and shapes are
        those of `main`, which this process must have saved before.
        """
        folder.mkdir(exist_ok=True)
        optimizer = self._engine.optimizer
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        inner: dict[str, Any] = {"zero_stage": self.stage, key: list(partitions)}
        inner["partition_count"] = optimizer.partition_count
        if self.stage == 2:
            inner["param_alignment_paddings"] = optimizer.state_dict().get(
                "param_alignment_paddings"
            )
        shard = Path(self._engine._get_zero_ckpt_name(str(main.parent), main.name)).name
        torch.save({"optimizer_state_dict": inner}, folder / shard)
        if self.stage == 3 or self.world.is_main:
            states = Path(self._engine._get_ckpt_name(str(main.parent), main.name))
            (folder / states.name).write_bytes(states.read_bytes())

    def load_alike(self, folder: Path) -> list[Tensor]:
        """This rank's partitions, as `save_alike` wrote them."""
        shard = self._engine._get_zero_ckpt_name(str(folder.parent), folder.name)
        inner = torch.load(shard, map_location=self.device, weights_only=False)
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        partitions: list[Tensor] = inner["optimizer_state_dict"][key]
        return partitions

    def gather(self, partitions: Sequence[Tensor]) -> dict[str, Tensor]:
        """Full tensors by `state_dict` name from all ranks' `partitions`, in rank 0's host memory.

        All ranks must call; ranks other than 0 get an empty dict. One parameter is whole at a time
        outside rank 0. Nothing of the running training is touched. Buffers are rank 0's.
        """
        full = self._gather_zero3(partitions) if self.stage == 3 else self._gather_zero2(partitions)
        if not self.world.is_main:
            return {}
        by_id = {id(p): full[id(p)] for p in self.module.parameters()}
        names = {
            name: by_id[id(p)].clone()
            for name, p in self.module.named_parameters(remove_duplicate=False)
        }
        persistent = set(self.module.state_dict()) - set(names)
        buffers = {n: b.detach().cpu().clone() for n, b in self.module.named_buffers()}
        return names | {n: buffers[n] for n in sorted(persistent)}

    def _gather_zero3(self, partitions: Sequence[Tensor]) -> dict[int, Tensor]:
        full: dict[int, Tensor] = {}
        for params, flat in zip(self._engine.optimizer.fp16_groups, partitions, strict=True):
            offset = 0
            for p in params:
                n = p.partition_numel()
                pieces = self._to_main(flat[offset : offset + n])
                offset += n
                if pieces:
                    full[id(p)] = torch.cat(pieces)[: p.ds_numel].view(p.ds_shape)
        return full

    def _gather_zero2(self, partitions: Sequence[Tensor]) -> dict[int, Tensor]:
        full: dict[int, Tensor] = {}
        optimizer = self._engine.optimizer
        for params, flat in zip(optimizer.round_robin_bit16_groups, partitions, strict=True):
            pieces = self._to_main(flat)
            if pieces:
                whole, offset = torch.cat(pieces), 0
                for p in params:
                    full[id(p)] = whole[offset : offset + p.numel()].view(p.shape)
                    offset += p.numel()
        return full

    def _to_main(self, piece: Tensor) -> list[Tensor]:
        pieces = [
            torch.empty_like(piece) for _ in range(self.world.size if self.world.is_main else 0)
        ]
        torch.distributed.gather(piece.contiguous(), pieces if self.world.is_main else None, dst=0)
        return [p.cpu() for p in pieces]

    def _forget_gradients(self) -> None:
        # A parameter that a step does not use keeps the gradient of its last use in ZeRO-3's
        # partition buffers, and the optimizer would apply it again: a step of text alone would
        # move the picture's parameters along a stale direction. Its gradient is zero.
        optimizer = self._engine.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
            for flat in optimizer.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()

    def _make_persistent_visible(self) -> None:
        # Small parameters stay gathered, but only from their first use inside a hook on. A module
        # may be asked for a table outside `forward`, so gather them at once.
        if self.stage == 3:
            self._engine.optimizer.checkpoint_event_epilogue()


def gathered(module: nn.Module) -> Any:
    """A context in which the parameters of `module` are whole on every rank."""
    return GatheredParameters(list(module.parameters()))


def read_offline(folder: Path) -> dict[str, Tensor]:
    """Full fp32 tensors by name from a ZeRO checkpoint of any world size, with no rank running."""
    with redirect_stdout(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}
