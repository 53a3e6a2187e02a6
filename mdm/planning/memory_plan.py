"""Where a rank's memory goes, planned from the configuration and the settings of ZeRO.

Sizes of states are arithmetic over the shapes of the parameters and the settings of ZeRO;
activations come from `mdm.planning.activations`. Nothing of the model is held in memory meanwhile.
Parameters are fp32 (see the engine), so that a state of one number a parameter takes 4 bytes.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mdm.config import Config
from mdm.loss import Loss
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Block
from mdm.planning.activations import activations
from mdm.train.deepspeed_config import load_deepspeed_config, zero_settings
from mdm.utils.precision import BF16, resolve

GIB = 2**30
CONTEXT = 2 * GIB  # CUDA's context, cuBLAS' workspace and NCCL's buffers: assumed, not measured
SLACK = 0.05  # of the rest: what the allocator cannot hand out again; assumed
FP32 = 4


@dataclass(frozen=True)
class Row:
    """One line of the memory plan."""

    name: str
    device: int  # bytes on the GPU
    host: int = 0  # bytes of the host's memory
    note: str = ""


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters: of each tensor, and of each block."""

    tensors: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.tensors)


@dataclass(frozen=True)
class MemoryPlan:
    """All rows, for one rank of `world_size`."""

    config: Config
    world_size: int
    rows: tuple[Row, ...]

    @property
    def total(self) -> int:
        """Bytes on the GPU at the fullest moment, with what is assumed on top."""
        return sum(row.device for row in self.rows)

    def device(self, name: str) -> int:
        """Bytes on the GPU of the row `name`."""
        return next(row.device for row in self.rows if row.name == name)


@lru_cache(maxsize=8)
def shapes_of(config: Config) -> Shapes:
    """Sizes of every parameter of the model, made without memory."""
    with torch.device("meta"):
        module: nn.Module = Loss(config)
    blocks = [m for m in module.modules() if isinstance(m, Block | AttentionBlock)]
    return Shapes(
        tuple(p.numel() for p in module.parameters()),
        tuple(sum(p.numel() for p in block.parameters()) for block in blocks),
    )


def plan(config: Config, world_size: int) -> MemoryPlan:
    """The memory plan of one rank; raises RunError for settings that the engine refuses."""
    values = load_deepspeed_config(config, world_size)
    zero = zero_settings(values)
    precision = resolve(config.train.precision, "cuda")
    shapes = shapes_of(config)
    states = _states3 if int(zero.stage) == 3 else _states2
    rows = [*states(config, world_size, zero, precision, shapes)]
    rows += _activations(config, world_size, precision)
    known = sum(row.device for row in rows)
    rows.append(Row("context", CONTEXT, note="CUDA, cuBLAS, NCCL: assumed"))
    rows.append(Row("slack", int(SLACK * known), note=f"{SLACK:.0%} of the above: assumed"))
    return MemoryPlan(config, world_size, tuple(rows))


def _states3(
    config: Config, world: int, zero: Any, precision: str, shapes: Shapes
) -> Iterator[Row]:
    part = FP32 * sum(-(-n // world) for n in shapes.tensors)
    hpz = min(zero.zero_hpz_partition_size, world)
    second = FP32 * sum(-(-n // hpz) for n in shapes.tensors) if hpz > 1 else 0
    host_params = zero.offload_param is not None and zero.offload_param.device == "cpu"
    host_states = zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"
    note = f"{shapes.total:,} in fp32, {world} ways"
    yield _row("parameters", part + second, host_params, note + (f"; hpZ {hpz}" if second else ""))
    yield _row("gradients", part * (2 if host_states else 1), host_states, "fp32, this rank's")
    # DeepSpeed 0.19.8 means to share fp32 partitions with the optimizer, but compares a device with
    # its name, so that there always is a second copy.
    yield _row("optimizer", 3 * part, host_states, "master copy and AdamW's two moments")
    averages = 2 if config.train.ema2 else 1
    yield _row("ema", averages * part, host_states, "fp32, this rank's")
    # Gradients of linear layers are reduced in the precision of their products, others in fp32.
    kinds = FP32 + (2 if precision == BF16 else 0)
    buckets = kinds * zero.reduce_bucket_size if zero.contiguous_gradients else 0
    yield Row("buckets", buckets, note="gradients on their way")
    threshold = zero.param_persistence_threshold
    yield Row(
        "persistent",
        FP32 * sum(n for n in shapes.tensors if n <= threshold),
        note=f"tensors of up to {threshold:,} numbers, whole on every rank",
    )
    leaf = sum(shapes.blocks) if config.train.gather == "trunk" else max(shapes.blocks)
    # Every small module before the blocks fetches some of them ahead, until the first limit. At the
    # turn stay those that are used again, backwards, within the second. What a block itself needs
    # is fetched beyond either.
    large = sum(n for n in shapes.tensors if n > threshold)
    ahead, again = int(zero.max_live_parameters), int(zero.max_reuse_distance) // 2 + leaf
    gathered = min(large, max(ahead, again) + leaf)
    yield Row("gathered", FP32 * gathered, note="whole parameters, in use and fetched ahead")
    staging = max(leaf, zero.reduce_bucket_size, max(shapes.tensors))
    yield Row("staging", FP32 * staging, note="an all-gather or reduce-scatter under way")
    step = 0 if host_states else part
    yield Row("step", step, note="gradients made contiguous for the optimizer")


def _states2(
    config: Config, world: int, zero: Any, precision: str, shapes: Shapes
) -> Iterator[Row]:
    total, part = FP32 * shapes.total, FP32 * -(-shapes.total // world)
    host = zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"
    yield Row("parameters", total, note=f"{shapes.total:,} in fp32, whole")
    yield _row("gradients", part, host, "fp32, this rank's")
    yield _row("optimizer", 3 * part, host, "master copy and AdamW's two moments")
    averages = 2 if config.train.ema2 else 1
    yield _row("ema", averages * part, host, "fp32, this rank's")
    copies = 2 if zero.overlap_comm else 1
    yield Row("buckets", FP32 * copies * zero.reduce_bucket_size, note="gradients on their way")
    yield Row("staging", FP32 * zero.allgather_bucket_size, note="an all-gather under way")
    yield Row("step", part, note="gradients made contiguous for the optimizer")


def _row(name: str, size: int, on_host: bool, note: str) -> Row:
    return Row(name, 0, size, note + "; on the host") if on_host else Row(name, size, 0, note)


def _activations(config: Config, world: int, precision: str) -> Iterator[Row]:
    samples, checkpointed = config.data.global_batch // world, config.train.activation_checkpointing
    tasks = [activations(config, samples, image, precision) for image in (True, False)]
    found = max(tasks, key=lambda a: a.kept(checkpointed) + a.work(checkpointed))
    task = "an image and its text" if found is tasks[0] else "text alone"
    other = found.trunk if checkpointed else found.trunk_checkpointed
    how = "checkpointed; without that" if checkpointed else "with checkpointing"
    note = f"{samples} samples of {task}, {how} {other / GIB:.1f} GiB"
    yield Row("activations", found.kept(checkpointed) - found.heads, note=note)
    yield Row("heads", found.heads, note="VAE, embedding, text head, losses")
    yield Row("work", found.work(checkpointed), note="inside one block or the heads")


def remedies(config: Config, world_size: int, memory: int) -> list[str]:
    """Flags that bring the plan under `memory` bytes, each alone or with checkpointing; best first.

    What leaves the training as it is comes before what changes it.
    """
    found: list[str] = []
    base, flag = config, ""
    if not config.train.activation_checkpointing:
        base = _with_train(config, activation_checkpointing=True)
        flag = "--train.activation_checkpointing"
        if _fits(base, world_size, memory):
            found.append(flag)
    offload = _with_train(base, deepspeed="deepspeed_configs/zero3_offload.json")
    if offload != base and _fits(offload, world_size, memory):
        found.append(f"{flag} --train.deepspeed {offload.train.deepspeed}".strip())
    sizes = (world_size * 2**k for k in range(1, 8))
    allowed = [w for w in sizes if config.data.global_batch % w == 0]
    if more := next((w for w in allowed if _fits(base, w, memory)), None):
        found.append(f"{flag} on {more} ranks".strip())
    batch = config.data.global_batch
    while batch % 2 == 0 and (batch := batch // 2) >= world_size and batch % world_size == 0:
        smaller = dataclasses.replace(base, data=dataclasses.replace(base.data, global_batch=batch))
        if _fits(smaller, world_size, memory):
            found.append(f"{flag} --data.global_batch {batch}".strip())
            break
    return found


def _with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def _fits(config: Config, world_size: int, memory: int) -> bool:
    return plan(config, world_size).total <= memory
