"""Who this process is among the ranks."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` processes, on `node`, `local_rank` there."""

    rank: int = 0
    size: int = 1
    node: int = 0
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.size}")

    @classmethod
    def from_env(cls) -> "World":
        """The world that the launcher (deepspeed, torchrun) describes; alone without one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        return cls(rank=rank, size=size, node=rank // max(per_node, 1), local_rank=local)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the job (console, MLflow, markers)."""
        return self.rank == 0
