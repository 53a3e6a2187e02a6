"""The one door to DeepSpeed: ranks, ZeRO, precision, sharded state.

The JSON owns ZeRO and offload; `Config` owns batch, clipping, rate and precision. A key on the
wrong side is refused, so that no knob has two owners.
"""

import functools
import gc
import json
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mdm.checkpoint.shards import Shards
from mdm.checkpoint.state import RunError
from mdm.config import Config
from mdm.utils import precision
from mdm.utils.ranks import World

# DeepSpeed 0.19.8: its autotuner, which nothing here uses, imports mlflow on every rank where it is
# installed. That takes as long as the rest of DeepSpeed's import, and would happen before
# `mdm.utils.mlflow_run` has switched telemetry off.
_hidden = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
import deepspeed  # noqa: E402
from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import GatheredParameters  # noqa: E402
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402

if _hidden:
    del sys.modules["mlflow"]

ALLOWED = ("zero_optimization", "aio", "communication_data_type", "comms_logger")
OWNED_BY_CONFIG = {
    "train_batch_size": "--data.global_batch",
    "train_micro_batch_size_per_gpu": "--data.global_batch",
    "gradient_accumulation_steps": "--data.global_batch",
    "gradient_clipping": "--train.grad_clip",
    "optimizer": "--train.lr, --train.beta1, --train.beta2, --train.weight_decay",
    "scheduler": "--train.warmup, --train.decay",
    "seed": "--seed",
    "torch_autocast": "--train.precision",
    "bf16": "--train.precision, which keeps parameters in fp32",
    "fp16": "--train.precision, which keeps parameters in fp32",
}


def load_deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the JSON of `train.deepspeed` plus what `config` owns.

    Raises RunError for a missing or malformed file, a key that `config` owns, an unknown key, a
    ZeRO stage other than 2 or 3, and a batch that the ranks cannot share evenly.
    """
    path = Path(config.train.deepspeed)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"--train.deepspeed {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"--train.deepspeed {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"--train.deepspeed {path} holds a {type(values).__name__}, not an object")
    _check_keys(values, path)
    _check_values(values, path)
    if config.data.global_batch % world_size:
        raise RunError(
            f"data.global_batch {config.data.global_batch} is not a multiple of {world_size} ranks"
        )
    return values | {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.grad_clip,
        "torch_autocast": {
            "enabled": precision.resolve(config.train.precision, _device_type()) == precision.BF16,
            "dtype": "bfloat16",
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _check_keys(values: dict[str, Any], path: Path) -> None:
    """RunError for a key that `Config` owns or nobody knows."""
    for key in values:
        if key in OWNED_BY_CONFIG:
            raise RunError(
                f"{path} sets {key!r}, which is owned by {OWNED_BY_CONFIG[key]}; remove it"
            )
        if key not in ALLOWED:
            raise RunError(f"{path} sets unknown key {key!r}; it may hold {', '.join(ALLOWED)}")


def _check_values(values: dict[str, Any], path: Path) -> None:
    """RunError for a value of the wrong kind."""
    for key in ("zero_optimization", "aio", "comms_logger"):
        if not isinstance(values.get(key, {}), dict):
            raise RunError(f"{path}: {key} is {values[key]!r}, not an object")
    kind = values.get("communication_data_type")
    if kind not in (None, "fp32", "fp16", "bf16"):
        raise RunError(f"{path}: communication_data_type is {kind!r}; choose fp32, fp16 or bf16")
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in (2, 3):
        raise RunError(f"{path}: zero_optimization.stage is {stage!r}; the engine supports 2 and 3")
    try:
        zero_settings(values)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise RunError(f"{path}: zero_optimization.{field}: {error.errors()[0]['msg']}") from error


def zero_settings(values: dict[str, Any]) -> Any:
    """What `load_deepspeed_config` found under `zero_optimization`, with DeepSpeed's defaults."""
    return DeepSpeedZeroConfig(**values["zero_optimization"])


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
    _init_deepspeed(timeout)
    return world


def pretend_ranks(size: int) -> World:
    """Be one rank of `size` with nobody else there: every collective answers with its own.

    On torch's `fake` group an all-gather repeats what this rank gave, a reduce-scatter hands back
    its own slice and a broadcast is silent: shapes, buffers and bytes are those of the real run.
    The rank is 0: DeepSpeed has every other one compare itself with what rank 0 broadcasts.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    _init_deepspeed(timedelta(minutes=10))
    return World(0, size)


def _init_deepspeed(timeout: timedelta) -> None:
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed still calls these by their former names, several times a step.
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)
    # The last collectives are written down when a rank hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # The shared-memory op serves inference alone (`inference_all_reduce`), takes 40 s to compile
    # and leaves 66 MiB in /dev/shm for every killed rank: training does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)


def _device_type() -> str:
    return str(deepspeed.accelerator.get_accelerator().device_name())


def device_of_rank() -> torch.device:
    """The device that this rank trains on."""
    return torch.device(deepspeed.accelerator.get_accelerator().current_device_name())


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
    """Parameter groups: weights of projections, convolutions and embedding tables decay.

    Nothing else does: biases, norms, `A_log`, `D`, `dt_bias`, positions, learned tokens, and what
    is marked `_no_weight_decay`. The name tells the role; the shape does not, as a mixer's
    parameters have a leading scan axis.
    """
    if weight_decay == 0:
        return [{"params": list(module.parameters()), "weight_decay": 0.0}]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in module.named_parameters():
        shape = getattr(p, "ds_shape", p.shape)  # of the whole, where ZeRO-3 has partitioned it
        is_matrix = name.rpartition(".")[2] == "weight" and len(shape) >= 2
        groups[is_matrix and not getattr(p, "_no_weight_decay", False)].append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in groups.items()
        if params
    ]


@contextmanager
def _partitioned_when_made(
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


class Engine:
    """A module under ZeRO with AdamW: forward, backward, step, and its sharded fp32 state.

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
        # DeepSpeed's autocast inherits this setting: see `precision.autocast`.
        torch.set_autocast_cache_enabled(False)
        torch.manual_seed(config.seed)
        with _partitioned_when_made(leaf_classes if zero["stage"] == 3 else (), values):
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
        self.world, self.stage = world, int(zero["stage"])
        self.grad_norm = 0.0  # global, of the last step, before clipping
        self._norm_limit = math.inf
        self._watch_norm()
        self.device: torch.device = torch.device(self._engine.device)
        self.shards = Shards(self._engine.module, self._engine.optimizer, self.stage, world)
        self._make_persistent_visible()

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer, for those who count what it holds."""
        return self._engine.optimizer

    @property
    def module(self) -> nn.Module:
        """The module itself; under ZeRO-3 its parameters may be partitioned."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, *inputs: Any) -> Any:
        """The module's output under the run's precision."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, reduced over the ranks and partitioned."""
        if self.stage == 3:
            self._forget_gradients()
        self._engine.backward(loss)

    def step(self, rate: float, norm_limit: float = math.inf) -> None:
        """Clip, and update this rank's partition at learning rate `rate`.

        Nothing is updated if the gradient's norm is not finite or above `norm_limit`.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        # Where DeepSpeed finds a gradient that is not finite it may ask for no norm.
        self._norm_limit, self.grad_norm = norm_limit, math.inf
        self._engine.step()

    @property
    def was_step_applied(self) -> bool:
        """Whether the last `step` changed parameters."""
        return bool(self._engine.was_step_applied())

    def buffers(self) -> list[Tensor]:
        """Copies of what the module keeps beside parameters, for `restore_buffers`."""
        return [b.detach().clone() for b in self.module.buffers()]

    def restore_buffers(self, values: Sequence[Tensor]) -> None:
        """Put back what `buffers` gave."""
        for buffer, value in zip(self.module.buffers(), values, strict=True):
            buffer.copy_(value)

    def fp32_partitions(self) -> list[Tensor]:
        """This rank's flat fp32 master weights, live, one tensor an optimizer sub-group."""
        return self.shards.partitions()

    def gather(self, partitions: Sequence[Tensor]) -> dict[str, Tensor]:
        """Full tensors by `state_dict` name from all ranks' `partitions`; see `Shards.gather`."""
        return self.shards.gather(partitions)

    def restored(self, optimizer_steps: int) -> None:
        """Go on from what was written into `shards.live()`; all ranks must call."""
        self.shards.adopt(optimizer_steps)
        self._make_persistent_visible()

    def _watch_norm(self) -> None:
        # DeepSpeed skips a step on all ranks where the global norm is not finite; so one above the
        # limit is reported as infinite. The optimizer computes it on all ranks alike.
        optimizer = self._engine.optimizer
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        compute = getattr(optimizer, name)

        def watched() -> Any:
            found = compute()
            norm = combine_grad_norm_groups(found) if self.stage == 3 else found
            self.grad_norm = float(norm)
            if self.grad_norm <= self._norm_limit:
                return found
            infinite = torch.full_like(norm, math.inf)
            return [infinite] if self.stage == 3 else infinite

        setattr(optimizer, name, watched)

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
