"""A Mamba-2 block on a CPU, forward and backward, against transformers' mixer."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from benchmarks.shapes import SHAPES, Shape, projections, scan_products
from benchmarks.timing import THREADS, Result, matmul_floor, milliseconds, worst
from mdm.model.decoder import Block
from mdm.model.sequence import Order
from mdm.utils.precision import autocast, is_bf16_fast


def peer(shape: Shape, chunk_size: int) -> Mamba2Mixer:
    """transformers' mixer with the same sizes."""
    config = shape.config
    sizes = Mamba2Config(
        hidden_size=shape.width,
        state_size=config.d_state,
        head_dim=config.headdim,
        num_heads=shape.heads,
        n_groups=1,
        chunk_size=chunk_size,
    )
    return Mamba2Mixer(sizes, layer_idx=0).train()


def case(shape: Shape, dtype: torch.dtype) -> Result:
    """All contestants at one shape; ours includes the norm, the scan order and the residual."""
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.length, shape.width, requires_grad=True)
    grad = torch.randn_like(x)
    order = torch.arange(shape.length).unsqueeze(1)
    mixed = dtype == torch.bfloat16

    def timed(module: torch.nn.Module, *args: object) -> Callable[[], object]:
        inputs = (x, *module.parameters())

        def run() -> tuple[Tensor, ...]:
            with autocast("bf16" if mixed else "fp32"):
                y = module(x, *args)
            return torch.autograd.grad(y, inputs, grad.to(y.dtype))

        return run

    ours = Block(shape.config, 1).train()
    names = {256: "transformers", shape.chunk: "transformers, chunks as ours"}
    times = milliseconds(
        {"ours": timed(ours, Order(order, order.clone()))}
        | {name: timed(peer(shape, chunk)) for chunk, name in names.items()}
        | {"floor": matmul_floor([*projections(shape), *scan_products(shape)], dtype)}
    )
    own, floor = times.pop("ours"), times.pop("floor")
    precision = "bf16 autocast" if mixed else "fp32"
    setting = f"{shape}, {precision}, {THREADS} thread"
    return Result("block_cpu", "ms", own, times, setting, floor)


def run() -> Result:
    """Forward and backward of a block at every shape, in each precision that is fast here."""
    kinds = (torch.float32, torch.bfloat16)[: 1 + is_bf16_fast()]
    return worst("block_cpu", (case(shape, kind) for kind in kinds for shape in SHAPES))
