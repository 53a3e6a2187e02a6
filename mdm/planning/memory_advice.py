"""What to change when a run needs more memory than a GPU has: the one list of such advice."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mdm.config import Config
from mdm.planning.memory_plan import plan
from mdm.utils.ranks import World

_SETTINGS: dict[str, Any] = {
    "activation_checkpointing": True,
    "gather": "block",
    "deepspeed": "deepspeed_configs/zero3_offload.json",
}


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


def changes_that_fit(config: Config, world_size: int, memory: int) -> list[str]:
    """The changes that bring the memory plan under `memory` bytes, best first.

    Each is tried alone, or with activation checkpointing where that is off.
    """
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
