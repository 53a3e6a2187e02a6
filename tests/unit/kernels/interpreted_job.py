"""Run our kernels and mamba_ssm's on the same inputs and save both results for the test.

Run as `python -m tests.unit.kernels.interpreted_job FILE` in the interpreter's environment.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.interpreter import load

load()

from mdm.config import ModelConfig  # noqa: E402
from mdm.kernels import conv, fused, ssd  # noqa: E402
from mdm.model.mamba2 import Mamba2, mix  # noqa: E402

Pairs = dict[str, tuple[Tensor, Tensor]]  # name -> (mamba_ssm's, ours)
LENGTH, CHUNK = 24, 16  # the last chunk is not full


def gradients(outputs: list[Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a weighted sum of all outputs in which every element has its own weight."""
    total = sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs)
    grads = torch.autograd.grad(total, list(inputs.values()))
    return dict(zip(inputs, grads, strict=True))


def scan(b: int, h: int, g: int, seq_idx: Tensor | None, dtype: torch.dtype) -> Pairs:
    """Outputs, final states and every gradient of both scans."""
    torch.manual_seed(0)
    p = n = 16
    inputs = {
        "x": torch.randn(b, LENGTH, h, p, dtype=dtype),
        "dt": torch.rand(b, LENGTH, h),
        "A": -torch.rand(h) - 0.1,
        "B": torch.randn(b, LENGTH, g, n, dtype=dtype),
        "C": torch.randn(b, LENGTH, g, n, dtype=dtype),
        "D": torch.randn(h),
        "z": torch.randn(b, LENGTH, h, p, dtype=dtype),
        "dt_bias": torch.randn(h),
        "initial_states": torch.randn(b, h, p, n),
    }

    def run(kernel: Callable[..., Any]) -> dict[str, Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        options = {"chunk_size": CHUNK, "dt_softplus": True, "return_final_states": True}
        y, state = kernel(**leaves, **options, seq_idx=seq_idx)
        grads = gradients([y.float(), state], leaves)
        return {"y": y, "final state": state} | {f"d{name}": t for name, t in grads.items()}

    theirs, ours = run(fused.ssd), run(ssd.ssd)
    return {name: (theirs[name].detach(), ours[name].detach()) for name in ours}


def mixer() -> Pairs:
    """Slice 1 of our stacked mixers and a stock `mamba_ssm.Mamba2`, forward and backward."""
    sizes = {"d_model": 16, "d_state": 16, "headdim": 16, "chunk_size": CHUNK}
    config = ModelConfig(**sizes, discretization="euler")
    torch.manual_seed(0)
    ours = Mamba2(config, 3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stock = fused.stock_mixer(**sizes, use_mem_eff_path=False)
    stock.load_state_dict({name: p[1] for name, p in ours.state_dict().items()}, strict=True)
    u = torch.randn(1, LENGTH, 16)

    def slice_1_of_ours(x: Tensor) -> Tensor:
        scans = x.unsqueeze(2).expand(-1, -1, 3, -1)
        return mix(scans, ours.weights, None, **ours.settings)[:, :, 1]

    def run(module: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        x = u.clone().requires_grad_()
        y = forward(x)
        return {"y": y} | gradients([y], {"u": x} | dict(module.named_parameters()))

    theirs, slice_1 = run(stock, stock), run(ours, slice_1_of_ours)
    return {
        name: (theirs[name].detach(), (t if name in ("y", "u") else t[1]).detach())
        for name, t in slice_1.items()
    }


def main() -> None:
    """Save {case: pairs}."""
    # causal-conv1d has no Triton kernel, so the stock module uses ours instead.
    from mamba_ssm.modules import mamba2

    mamba2.causal_conv1d_fn = lambda x, weight, bias, activation, **_: conv.causal_conv(
        x.transpose(1, 2), weight.unsqueeze(1), bias
    ).transpose(1, 2)
    position = torch.arange(LENGTH)
    packed = ((position >= 7).int() + (position >= 19))[None]  # a start in each chunk
    torch.save(
        {
            "scan": scan(2, 2, 1, None, torch.float32),
            "packed scan": scan(1, 4, 2, packed + 3, torch.float32),
            # Half precision, because the interpreter does not support bf16.
            "half scan": scan(1, 4, 2, packed, torch.float16),
            "mixer": mixer(),
        },
        sys.argv[1],
    )


if __name__ == "__main__":
    main()
