"""This process's rank, and small collectives for control messages."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` of `size` processes, `local_rank` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.size}")

    @classmethod
    def from_env(cls) -> "World":
        """The world that the launcher (deepspeed, torchrun) describes, or a single rank."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the job (console, MLflow, markers)."""
        return self.rank == 0


def exchange(row: Sequence[float], device: torch.device | str = "cpu") -> list[list[float]]:
    """Every rank's row of float64 numbers, in rank order, on every rank: one small all-gather."""
    sent = torch.tensor(row, dtype=torch.float64, device=device)
    size = torch.distributed.get_world_size()
    table = torch.empty(size * len(row), dtype=torch.float64, device=device)
    torch.distributed.all_gather_into_tensor(table, sent)
    rows: list[list[float]] = table.view(size, len(row)).tolist()
    return rows


def from_main(value: Any, group: Any = None) -> Any:
    """Rank 0's value, on every rank (pickled: for small control messages).

    A thread that communicates beside the training needs a `group` of its own.
    """
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_to_all(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, in rank order, on every rank (pickled: for small control messages)."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values
