"""Checks that need a GPU: kernels against their references, speed against stock mamba_ssm."""

import dataclasses
import importlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mdm.config import Config, ModelConfig, doc
from mdm.kernels import conv, fused
from mdm.kernels import ssd as torch_ssd
from mdm.loss import Loss
from mdm.model.count import trunk_macs
from mdm.model.decoder import Trunk, block_scans
from mdm.planning.activations import largest_batch, longest
from mdm.presets import PRESETS
from mdm.utils.command_line import fail
from mdm.utils.precision import BF16, autocast

DEVICE = "cuda"
MEASURED = ("mdm_1b", "mdm_7b")
# Largest error as a share of the largest value. Triton multiplies fp32 in TF32, of 10 bits.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Flags:
    """How to measure, and where to."""

    batch: int = doc(8, "sequences a step")
    steps: int = doc(10, "measured steps, after three that do not count")
    peak_tflops: float = doc(0.0, "dense bf16 peak of the GPU; 0 looks its name up")
    out: str = doc("runs/gpu-check/report.json", "where the report goes")


def layers_that_fit(budget: int, two: int, four: int, n_layer: int) -> int:
    """Layers within `budget` bytes, from the peaks of a step with two and with four of them."""
    a_layer = max((four - two) // 2, 1)
    return max(0, min(n_layer, 2 + (budget - two) // a_layer))


def row(
    what: str, layers: int, seconds: float, tokens: int, flops: int, peak: float | None, memory: int
) -> dict[str, Any]:
    """One line of the table: a step on `tokens` whose forward pass takes `flops`."""
    return {
        "what": what,
        "layers": layers,
        "ms": 1e3 * seconds,
        "tokens/s": tokens / seconds,
        # A backward pass costs two forward passes.
        "MFU": None if peak is None else 3 * flops / seconds / peak,
        "GiB": memory / 2**30,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text, with a dash for None."""

    def show(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:,.3f}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([show(v) for v in r.values()] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])])
        for name, *others in cells
    )


def install() -> None:
    """Build the extra `gpu` for this machine, replacing what `make setup` built without CUDA."""
    probe = [sys.executable, "-c", "import causal_conv1d, mamba_ssm"]
    if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0:
        return
    pip = [sys.executable, "-m", "pip", "install", "-c", "infra/constraints.txt"]
    pip += ["--no-build-isolation", "--no-cache-dir"]  # a cached wheel may lack the kernels
    kernels = ["--force-reinstall", "--no-deps", "causal-conv1d", "mamba-ssm"]
    try:
        subprocess.run([*pip, *kernels], check=True)
        subprocess.run([*pip, "-e", ".[gpu]"], check=True)
    except subprocess.CalledProcessError as error:
        fail(f"gpu-check: {error}; the kernels are built with nvcc of the CUDA that torch has")
    importlib.invalidate_caches()


def compare(
    name: str, dtype: torch.dtype, ours: Sequence[Tensor], theirs: Sequence[Tensor]
) -> dict[str, Any]:
    """The largest difference of two lists of tensors, relative to each tensor's largest value."""
    errors = [
        (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12)
        for a, b in zip(ours, theirs, strict=True)
    ]
    error = float(torch.stack(errors).max())  # NaN if one is
    return {
        "what": name,
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "limit": TOLERANCE[dtype],
        "passed": error <= TOLERANCE[dtype],
    }


def outputs_and_gradients(run: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of `run` for `inputs`, then the gradient of each input."""
    leaves = [t.detach().to(DEVICE, copy=True).requires_grad_() for t in inputs]
    results = run(*leaves)
    outputs = list(results) if isinstance(results, tuple) else [results]
    total = sum(
        (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum()
        for y in outputs
    )
    assert isinstance(total, Tensor)
    return [y.detach() for y in outputs] + list(torch.autograd.grad(total, leaves))


def parity(dtype: torch.dtype, packed: bool) -> list[dict[str, Any]]:
    """Compares scan and convolution, fused and torch, on the same inputs."""
    torch.manual_seed(0)
    b, length, h, p, n = 2, 300, 8, 64, 128
    seq_idx = None
    if packed:
        place = torch.arange(length)
        seq_idx = ((place >= 70).long() + (place >= 260)).expand(b, -1).to(DEVICE)
    x, z = (torch.randn(b, length, h, p, dtype=dtype) for _ in range(2))
    B, C = (torch.randn(b, length, 1, n, dtype=dtype) for _ in range(2))
    dt, A, D = torch.rand(b, length, h), -torch.rand(h) - 0.1, torch.randn(h)
    dt_bias, initial = torch.randn(h), torch.randn(b, h, p, n)

    names = ("D", "z", "dt_bias", "initial_states")
    options = {"chunk_size": 128, "dt_softplus": True, "return_final_states": True}

    def scan(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *t: kernel(
            *t[:5], **dict(zip(names, t[5:], strict=True)), **options, seq_idx=seq_idx
        )

    scan_inputs = (x, dt, A, B, C, D, z, dt_bias, initial)
    scans = [outputs_and_gradients(scan(k), scan_inputs) for k in (fused.ssd, torch_ssd.ssd)]
    conv_inputs = (x.flatten(2), torch.randn(h * p, 1, 4), torch.randn(h * p))
    convs = [
        outputs_and_gradients(lambda *t, kernel=kernel: kernel(*t, seq_idx), conv_inputs)
        for kernel in (fused.causal_conv, conv.causal_conv)
    ]
    kind = "packed " if packed else ""
    return [
        compare(f"{kind}scan, forward and gradients", dtype, *scans),
        compare(f"{kind}convolution, forward and gradients", dtype, *convs),
    ]


class StockStack(nn.Module):
    """A plain stack of mamba_ssm's blocks: x + the mean of a block's mixers over RMSNorm(x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        names = ("d_model", "d_state", "headdim", "expand", "d_conv", "chunk_size")
        sizes = {name: getattr(config, name) for name in names}
        blocks = block_scans(config)
        self.norms = nn.ModuleList(nn.RMSNorm(config.d_model, eps=1e-5) for _ in blocks)
        self.blocks = nn.ModuleList(
            nn.ModuleList(fused.stock_mixer(**sizes) for _ in scans) for scans in blocks
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        for norm, mixers in zip(self.norms, self.blocks, strict=True):
            assert isinstance(mixers, nn.ModuleList)
            normed = norm(x)
            x = x + sum(mixer(normed) for mixer in mixers) / len(mixers)
        return x


def measure(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int) -> tuple[float, int]:
    """Median seconds of a training step in bf16 autocast with AdamW, and its peak bytes."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with autocast(BF16, DEVICE):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[3:]), torch.cuda.max_memory_allocated()


def train_loss(config: Config, model: ModelConfig, flags: Flags, steps: int) -> tuple[float, int]:
    """Seconds and peak bytes of a step of `Loss` with the sizes of `model`."""
    loss = Loss(dataclasses.replace(config, model=model)).to(DEVICE).train()
    batch = largest_batch(config, flags.batch)
    step = itertools.count()
    return measure(lambda: loss(batch, next(step)).total, list(loss.parameters()), steps)


def train_blocks(
    blocks: nn.Module, shape: tuple[int, ...], steps: int, *arguments: Any
) -> tuple[float, int]:
    """Seconds and peak bytes of a step of blocks alone, on a random sequence of `shape`."""
    blocks = blocks.to(DEVICE).train()
    x = torch.randn(shape, device=DEVICE)

    def loss() -> Tensor:
        y: Tensor = blocks(x, *arguments)
        return y.float().square().mean()

    return measure(loss, list(blocks.parameters()), steps)


def check_preset(name: str, flags: Flags, peak: float | None) -> list[dict[str, Any]]:
    """Rows for one block and for training steps of a preset, with our blocks and stock ones."""
    config = PRESETS[name]
    model = dataclasses.replace(config.model, kernel="fused")
    layout = longest(config, with_image=True)
    length = layout.length
    shape = (flags.batch, length, model.d_model)
    rows: list[dict[str, Any]] = []

    def add(what: str, sizes: ModelConfig, run: Callable[[], tuple[float, int]]) -> None:
        try:
            seconds, memory = run()
        except torch.OutOfMemoryError:
            tqdm.write(f"{name} {what}: {sizes.n_layer} layers do not fit at batch {flags.batch}")
            return
        finally:
            torch.cuda.empty_cache()
        tokens, flops = flags.batch * length, 2 * flags.batch * sum(trunk_macs(sizes, length))
        rows.append(row(f"{name} {what}", sizes.n_layer, seconds, tokens, flops, peak, memory))

    def add_both(what: str, n_layer: int, ours: Callable[[ModelConfig], tuple[float, int]]) -> None:
        sizes = dataclasses.replace(model, n_layer=n_layer)
        add(what, sizes, lambda: ours(sizes))
        plain = dataclasses.replace(sizes, long_skip=False)
        stock = f"{what}, stock mixers"
        add(stock, plain, lambda: train_blocks(StockStack(plain), shape, flags.steps))

    add_both("block", 1, lambda sizes: train_blocks(Trunk(sizes), shape, flags.steps, layout))

    peaks = []
    for n_layer in (2, 4):
        sizes = dataclasses.replace(model, n_layer=n_layer)
        peaks.append(train_loss(config, sizes, flags, 1)[1])
        torch.cuda.empty_cache()
    budget = int(0.92 * torch.cuda.get_device_properties(0).total_memory)
    fit = layers_that_fit(budget, peaks[0], peaks[1], model.n_layer)
    if fit == 0:
        tqdm.write(f"{name}: not even one layer fits at batch {flags.batch}; lower --batch")
        return rows
    add_both("training", fit, lambda sizes: train_loss(config, sizes, flags, flags.steps))
    return rows
