"""Where ZeRO keeps a rank's part of the weights and of Adam's state, in DeepSpeed 0.19.8.

ZeRO stages 2 and 3 lay parameters out differently; only `pieces` knows how. The attributes read
here are private to DeepSpeed: its version is pinned, and tests compare every number.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from mdm.checkpoint.snapshot import Piece
from mdm.utils.ranks import World, gather_to_all

CHUNK = 1 << 20  # numbers that a rank sends to rank 0 at a time


class Shards:
    """The flat fp32 tensors of one rank, and which parameters they hold.

    Args:
        module: the model; under ZeRO-3 its parameters are partitioned.
        optimizer: DeepSpeed's ZeRO optimizer around an Adam.
        stage: ZeRO stage, 2 or 3.
        world: this rank's place.
    """

    def __init__(self, module: nn.Module, optimizer: Any, stage: int, world: World) -> None:
        self._module, self._optimizer = module, optimizer
        self._stage, self._world = stage, world

    def _flats(self) -> list[Tensor]:
        of_stage = {2: "single_partition_of_fp32_groups", 3: "fp32_partitioned_groups_flat"}
        return list(getattr(self._optimizer, of_stage[self._stage]))

    def partitions(self) -> list[Tensor]:
        """This rank's flat fp32 master weights, live, one tensor for each optimizer sub-group."""
        return [flat.data for flat in self._flats()]

    def pieces(self) -> list[Piece]:
        """Which parts of which parameters this rank's flat partitions hold, without padding.

        ZeRO-3 gives each rank an equal part of each parameter; ZeRO-2 lays the parameters of a
        group end to end and gives each rank an equal part of that.
        """
        pieces, at, optimizer, rank = [], 0, self._optimizer, self._world.rank
        names = {id(p): name for name, p in self._module.named_parameters()}
        if self._stage == 3:
            for p in (p for group in optimizer.fp16_groups for p in group):
                n = p.partition_numel()
                start = min(rank * n, p.ds_numel)
                pieces.append(Piece(names[id(p)], start, min(n, p.ds_numel - start), at))
                at += n
            return [piece for piece in pieces if piece.length]
        groups = zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.partition_size,
            strict=True,
        )
        for params, offsets, size in groups:
            for p, offset in zip(params, offsets, strict=True):
                first = max(offset, rank * size)
                last = min(offset + p.numel(), (rank + 1) * size)
                if first < last:
                    place = (first - offset, last - first, at + first - rank * size)
                    pieces.append(Piece(names[id(p)], *place))
            at += size
        return pieces

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of whole parameters by name; tied parameters appear once."""
        return {
            n: list(getattr(p, "ds_shape", p.shape)) for n, p in self._module.named_parameters()
        }

    def tied(self) -> dict[str, str]:
        """The other names of tied parameters, each with its name in `shapes`."""
        first = {id(p): name for name, p in self._module.named_parameters()}
        every = self._module.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if name != first[id(p)]}

    def live(self) -> dict[str, list[Tensor]]:
        """This rank's live flat fp32 weights and Adam's two moments, as lists of sub-groups."""
        states = [self._adam(flat) for flat in self._flats()]
        return {
            "weights": self.partitions(),
            "exp_avg": [state["exp_avg"] for state in states],
            "exp_avg_sq": [state["exp_avg_sq"] for state in states],
        }

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam took, without skipped ones."""
        return int(self._adam(self._flats()[0])["step"])

    def adopt(self, optimizer_steps: int) -> None:
        """Update the parameters from `live()`, after it was written to; all ranks must call."""
        optimizer = self._optimizer
        for flat in self._flats():
            state = self._adam(flat)
            if isinstance(state["step"], Tensor):
                state["step"].fill_(optimizer_steps)
            else:
                state["step"] = optimizer_steps
        if self._stage == 3:
            for i in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            return
        groups = optimizer.parallel_partitioned_bit16_groups
        for parts, flat in zip(groups, self.partitions(), strict=True):
            torch.distributed.all_gather(list(parts), flat.to(parts[0]))

    def _adam(self, flat: Tensor) -> dict[str, Any]:
        """Adam's state of one flat partition; if missing, made as Adam's first step would."""
        adam = self._optimizer.optimizer
        state: dict[str, Any] = adam.state[flat]
        if not state:
            fused = isinstance(adam, torch.optim.AdamW)
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device) if fused else 0
            state["exp_avg"] = torch.zeros_like(flat.data)
            state["exp_avg_sq"] = torch.zeros_like(flat.data)
        return state

    def buffers(self) -> dict[str, Tensor]:
        """This rank's persistent buffers by name, copied to host memory."""
        persistent = self._module.state_dict().keys()
        return {
            name: buffer.detach().cpu().clone()
            for name, buffer in self._module.named_buffers()
            if name in persistent
        }

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        """Set buffers to `values`, as returned by `buffers`; others keep their values."""
        for name, buffer in self._module.named_buffers():
            if name in values:
                buffer.copy_(values[name])

    def gather(self, partitions: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole tensors by `state_dict` name from all ranks' `partitions`, in rank 0's host memory.

        All ranks must call; ranks other than 0 get an empty dict. The training is not changed.
        Buffers are rank 0's.
        """
        tables = gather_to_all(self.pieces())
        length = sum(flat.numel() for flat in partitions)
        shares = [torch.empty(length) for _ in tables] if self._world.is_main else []
        at = 0
        for chunk in (chunk for flat in partitions for chunk in flat.split(CHUNK)):
            parts = [torch.empty_like(chunk) for _ in shares]
            torch.distributed.gather(chunk.contiguous(), parts or None, dst=0)
            for share, part in zip(shares, parts, strict=True):
                share[at : at + len(part)] = part
            at += len(chunk)
        if not self._world.is_main:
            return {}
        full = {name: torch.empty(shape) for name, shape in self.shapes().items()}
        for pieces, share in zip(tables, shares, strict=True):
            for name, start, n, offset in pieces:
                full[name].view(-1)[start : start + n] = share[offset : offset + n]
        full |= {name: full[other].clone() for name, other in self.tied().items()}
        return full | dict(sorted(self.buffers().items()))
