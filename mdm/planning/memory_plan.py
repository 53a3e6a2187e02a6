"""How much memory a rank needs for what, and what to change when that is more than a GPU has.

Sizes of states are computed from the shapes of the parameters and the settings of ZeRO; activations
come from `mdm.planning.activations`. No weights are allocated. Parameters are fp32 (see the
engine), so that a state of one number a parameter takes 4 bytes.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mdm.config import Config
from mdm.loss import Loss
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Block
from mdm.planning.activations import activations, longest, per_row
from mdm.train.deepspeed_config import load_deepspeed_config, zero_settings
from mdm.utils.precision import BF16, resolve
from mdm.utils.ranks import World

GIB = 2**30
CONTEXT = 2 * GIB  # CUDA's context, cuBLAS' workspace and NCCL's buffers: assumed, not measured
SLACK = 0.05  # of the rest: fragmentation of the allocator; assumed
FP32 = 4
# Settings of `train` that lower the memory of a rank.
_SETTINGS: dict[str, Any] = {
    "activation_checkpointing": True,
    "gather": "block",
    "deepspeed": "deepspeed_configs/zero3_offload.json",
}


@dataclass(frozen=True)
class Row:
    """One line of the memory plan."""

    name: str
    device: int  # bytes on the GPU
    host: int = 0  # bytes of the host's memory
    note: str = ""


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters by tensor and by block."""

    tensors: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.tensors)


@dataclass(frozen=True)
class MemoryPlan:
    """The rows for one rank of `world_size`."""

    config: Config
    world_size: int
    rows: tuple[Row, ...]

    @property
    def total(self) -> int:
        """Bytes on the GPU at the peak, including what is assumed."""
        return sum(row.device for row in self.rows)

    def device(self, name: str) -> int:
        """Bytes on the GPU of the row `name`."""
        return next(row.device for row in self.rows if row.name == name)


@lru_cache(maxsize=8)
def shapes_of(config: Config) -> Shapes:
    """Sizes of all parameters; no memory is allocated for them."""
    with torch.device("meta"):
        module: nn.Module = Loss(config)
    blocks = [m for m in module.modules() if isinstance(m, Block | AttentionBlock)]
    return Shapes(
        tuple(p.numel() for p in module.parameters()),
        tuple(sum(p.numel() for p in block.parameters()) for block in blocks),
    )


def plan(config: Config, world_size: int) -> MemoryPlan:
    """The memory plan of one rank; raises RunError for settings that the engine refuses."""
    zero = zero_settings(load_deepspeed_config(config, world_size))
    precision = resolve(config.train.precision, "cuda")
    rows = [*_states(config, world_size, zero, precision)]
    rows += _activations(config, world_size, precision)
    known = sum(row.device for row in rows)
    rows.append(Row("context", CONTEXT, note="CUDA, cuBLAS, NCCL: assumed"))
    rows.append(Row("slack", int(SLACK * known), note=f"{SLACK:.0%} of the above: assumed"))
    return MemoryPlan(config, world_size, tuple(rows))


def _states(config: Config, world: int, zero: Any, precision: str) -> Iterator[Row]:
    """Rows of parameters, gradients, optimizer, averages and what ZeRO needs to move them."""
    shapes, partitioned = shapes_of(config), int(zero.stage) == 3
    states_on_host = _is_on_host(zero.offload_optimizer)
    if partitioned:
        part = FP32 * sum(-(-n // world) for n in shapes.tensors)
        hpz = min(zero.zero_hpz_partition_size, world)
        secondary = FP32 * sum(-(-n // hpz) for n in shapes.tensors) if hpz > 1 else 0
        note = f"{shapes.total:,} in fp32, {world} ways" + (f"; hpZ {hpz}" if secondary else "")
        yield _row("parameters", part + secondary, _is_on_host(zero.offload_param), note)
    else:
        part = FP32 * -(-shapes.total // world)
        yield Row("parameters", FP32 * shapes.total, note=f"{shapes.total:,} in fp32, whole")
    copies = 2 if partitioned and states_on_host else 1
    yield _row("gradients", part * copies, states_on_host, "fp32, this rank's")
    # DeepSpeed 0.19.8 means to share fp32 partitions with the optimizer, but compares a device with
    # its name, so that there always is a second copy.
    yield _row("optimizer", 3 * part, states_on_host, "master copy and AdamW's two moments")
    averages = 2 if config.train.ema2 else 1
    yield _row("ema", averages * part, states_on_host, "fp32, this rank's")
    if partitioned:
        yield from _moving(config, zero, precision, shapes)
    else:
        copies = 2 if zero.overlap_comm else 1
        bucket = FP32 * copies * zero.reduce_bucket_size
        yield Row("buckets", bucket, note="gradients on their way")
        yield Row("staging", FP32 * zero.allgather_bucket_size, note="an all-gather under way")
    step = 0 if partitioned and states_on_host else part
    yield Row("step", step, note="gradients made contiguous for the optimizer")


def _moving(config: Config, zero: Any, precision: str, shapes: Shapes) -> Iterator[Row]:
    """Whole parameters and communication buffers under ZeRO-3."""
    # Gradients of linear layers are reduced in the precision of their products, others in fp32.
    kinds = FP32 + (2 if precision == BF16 else 0)
    buckets = kinds * zero.reduce_bucket_size if zero.contiguous_gradients else 0
    yield Row("buckets", buckets, note="gradients on their way")
    threshold = zero.param_persistence_threshold
    small = sum(n for n in shapes.tensors if n <= threshold)
    note = f"tensors of up to {threshold:,} numbers, whole on every rank"
    yield Row("persistent", FP32 * small, note=note)
    leaf = sum(shapes.blocks) if config.train.gather == "trunk" else max(shapes.blocks)
    # Every small module before the blocks prefetches some of them, up to the first limit. Where the
    # backward pass begins, parameters stay that it uses within the second limit. Parameters of the
    # current block are fetched beyond either.
    ahead, again = int(zero.max_live_parameters), int(zero.max_reuse_distance) // 2 + leaf
    gathered = min(shapes.total - small, max(ahead, again) + leaf)
    yield Row("gathered", FP32 * gathered, note="whole parameters, in use and fetched ahead")
    staging = max(leaf, zero.reduce_bucket_size, max(shapes.tensors))
    yield Row("staging", FP32 * staging, note="an all-gather or reduce-scatter under way")


def _is_on_host(offload: Any) -> bool:
    return offload is not None and offload.device == "cpu"


def _row(name: str, size: int, on_host: bool, note: str) -> Row:
    return Row(name, 0, size, note + "; on the host") if on_host else Row(name, size, 0, note)


def _activations(config: Config, world: int, precision: str) -> Iterator[Row]:
    rows, checkpointed = config.data.global_batch // world, config.train.activation_checkpointing
    tasks = [activations(config, rows, image, precision) for image in (True, False)]
    larger = max(tasks, key=lambda a: a.kept(checkpointed) + a.work(checkpointed))
    with_image = larger is tasks[0]
    samples, task = rows * per_row(config, with_image), "text alone"
    if with_image:
        task = "an image and its text"
    if samples > rows:
        task += f" in {rows} rows of {longest(config, with_image).length} places"
    other = larger.trunk if checkpointed else larger.trunk_checkpointed
    how = "checkpointed; without that" if checkpointed else "with checkpointing"
    note = f"{samples} samples of {task}, {how} {other / GIB:.1f} GiB"
    yield Row("activations", larger.kept(checkpointed) - larger.heads, note=note)
    yield Row("heads", larger.heads, note="VAE, embedding, text head, losses")
    yield Row("work", larger.work(checkpointed), note="inside one block or the heads")


class Change(NamedTuple):
    """One way to need less memory, of a kind: there may be several numbers of ranks to choose."""

    kind: str
    advice: str
    config: Config
    world_size: int


def memory_changes(config: Config, world_size: int) -> Iterator[Change]:
    """Changes that lower a rank's memory; those that leave the training as it is come first."""
    for name, value in _SETTINGS.items():
        if getattr(config.train, name) != value:
            flag = f"--train.{name}" if value is True else f"--train.{name} {value}"
            train = dataclasses.replace(config.train, **{name: value})
            yield Change(name, flag, dataclasses.replace(config, train=train), world_size)
    batch = config.data.global_batch
    for ranks in (world_size * 2**k for k in range(1, 8)):
        if batch % ranks == 0:
            yield Change("ranks", f"{ranks} ranks", config, ranks)
    while batch % 2 == 0 and (batch := batch // 2) % world_size == 0:
        smaller = dataclasses.replace(config.data, global_batch=batch)
        changed = dataclasses.replace(config, data=smaller)
        yield Change("batch", f"--data.global_batch {batch}", changed, world_size)


def explain_out_of_memory(error: BaseException, config: Config, world: World) -> str:
    """One line: what failed, what to change, and where the snapshot of the memory lies."""
    first: dict[str, str] = {}
    for change in memory_changes(config, world.size):
        first.setdefault(change.kind, change.advice)
    advice = ", or ".join(first.values()) or "GPUs with more memory"
    message = f"{str(error).split('. ')[0].rstrip('.')}; try {advice}"
    message += "; pipelines/rehearse.py shows what each of them saves"
    if torch.cuda.is_available():  # not run: no GPU
        path = Path(config.run_dir) / f"out-of-memory-rank{world.rank}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        message += f"; {path} opens on pytorch.org/memory_viz"
    return message


def changes_that_fit(needed: MemoryPlan, memory: int) -> list[str]:
    """The changes that bring the memory plan under `memory` bytes, best first.

    Each is tried alone, or with activation checkpointing where that is off.
    """
    config, world_size = needed.config, needed.world_size
    advice, prefix = dict[str, str](), ""
    if not config.train.activation_checkpointing:
        checkpointing = next(memory_changes(config, world_size))
        config, prefix = checkpointing.config, f"{checkpointing.advice} "
        if plan(config, world_size).total <= memory:
            advice[checkpointing.kind] = checkpointing.advice
    for change in memory_changes(config, world_size):
        if change.kind not in advice and plan(change.config, change.world_size).total <= memory:
            advice[change.kind] = prefix + change.advice
    return list(advice.values())
