"""Memory that a training step needs besides weights and states, measured without computing it.

The trunk runs on torch's fake tensors, which have shapes, types and lifetimes but no memory, so
that any size takes seconds. VAE, embedding and heads read values on their way and run on real
tensors, except for their matrix products, which would take a CPU minutes. Both run on one and on
two samples: memory grows linearly with the samples.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mdm.config import Config, DataConfig
from mdm.data.batch import Batch
from mdm.kernels import fused
from mdm.loss import Loss
from mdm.model.adaln import MODULATIONS
from mdm.model.decoder import Trunk
from mdm.model.sequence import Layout
from mdm.planning.footprint import Live, saved_activations
from mdm.utils.precision import autocast


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank, for its part of a batch."""

    trunk: int  # kept from forward to backward by all blocks, without checkpointing
    trunk_checkpointed: int  # the same with checkpointing: the blocks' inputs
    block: int  # peak of one block in forward and backward, its gradients included
    block_kept: int  # kept by one block from forward to backward
    heads: int  # kept by VAE, embedding, heads and losses
    heads_peak: int  # peak of these

    def kept(self, checkpointed: bool) -> int:
        """Bytes that a forward pass keeps for its backward pass."""
        return self.heads + (self.trunk_checkpointed if checkpointed else self.trunk)

    def work(self, checkpointed: bool) -> int:
        """Peak on top of `kept`: in the heads, or in the backward pass of the last block."""
        in_block = self.block - (0 if checkpointed else self.block_kept)
        return max(in_block, self.heads_peak - self.heads)


def largest_batch(config: Config, samples: int, with_image: bool = True) -> Batch:
    """Random samples with texts as long as the configuration allows."""
    model = config.model
    keys = torch.arange(samples)
    n = model.image_height * model.image_width
    latents = torch.randn(samples, n, model.latent_dim) if with_image else None
    text = longest(config, with_image).text
    return Batch(
        ids=tuple(f"sample-{i}" for i in range(samples)),
        keys=keys,
        epochs=torch.zeros_like(keys),
        class_ids=torch.full_like(keys, -1),
        tokens=torch.randint(4, model.vocab_size, (samples, text)),
        prompt=torch.zeros(samples, text, dtype=torch.bool),
        latents=latents,
    )


def longest(config: Config, with_image: bool) -> Layout:
    """The trunk's sequence for the longest sample of either task."""
    text = config.data.caption_length if with_image else config.data.dialogue_length
    return Layout.of(config.model, text, int(with_image))


def _trunk(
    config: Config, samples: int, with_image: bool, precision: str
) -> tuple[int, int, int, int]:
    """The first four numbers of `Activations`."""
    model, layout = config.model, longest(config, with_image)
    if model.kernel == "compiled":  # keeps less; counted as what it is compiled from
        model = dataclasses.replace(model, kernel="torch")
    shape = (samples, layout.length, model.d_model)
    small = dataclasses.replace(
        model,
        n_layer=min(4, model.n_layer),  # every kind of block is among the first four
        long_skip=False,
        d_model=model.headdim,
        expand=1,
        n_heads=1,
        n_kv_heads=1,
        kernel="torch",
    )
    # Scan orders are cached: this makes them, as real tensors.
    with torch.no_grad():
        Trunk(small)(torch.zeros(1, shape[1], small.d_model), layout)

    def run(trunk: nn.Module) -> tuple[Tensor, int]:
        x, modulation = torch.randn(shape, requires_grad=True), None
        if model.adaln:
            modulation = torch.randn(*shape[:-1], MODULATIONS * shape[-1], requires_grad=True)
        with autocast(precision), saved_activations(trunk) as saved:
            return trunk(x, layout, None, modulation), saved.bytes

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        # The CUDA kernels cannot run here; their sources say what they keep.
        mock.patch.object(fused, "ssd", _scan),
        mock.patch.object(fused, "causal_conv", _conv),
    ):
        whole = Trunk(model)
        kept = run(whole)[1]
        whole.checkpointing = True
        kept_checkpointed = run(whole)[1]
        block = Trunk(dataclasses.replace(model, n_layer=1, long_skip=False))
        with Live() as live:
            y, block_kept = run(block)
            y.sum().backward()
    return kept, kept_checkpointed, live.peak, block_kept


def _heads(config: Config, samples: int, with_image: bool, precision: str) -> tuple[int, int]:
    """The last two numbers of `Activations`."""
    tiny = dataclasses.replace(
        config.model, n_layer=1, long_skip=False, scan_mode="alternate", expand=1, d_state=1
    )
    loss = Loss(dataclasses.replace(config, model=tiny))
    loss.network.trunk = _NoTrunk()  # type: ignore[assignment]
    batch = largest_batch(config, samples, with_image)
    with _NoProducts(), Live() as live:  # type: ignore[no-untyped-call]
        with autocast(precision), saved_activations(loss) as saved:
            total = loss(batch, 0).total
        total.backward()
    # Gradients of these parameters are among what is alive, and counted elsewhere.
    gradients = sum(p.numel() * p.element_size() for p in loss.parameters())
    return saved.bytes, max(live.peak - gradients, saved.bytes)


@lru_cache(maxsize=8)
def _for_one_and_two(config: Config, with_image: bool, precision: str) -> list[tuple[int, ...]]:
    return [
        _trunk(config, n, with_image, precision) + _heads(config, n, with_image, precision)
        for n in (1, 2)
    ]


def activations(config: Config, samples: int, with_image: bool, precision: str) -> Activations:
    """What a step on `samples` samples of one task needs beside states and parameters."""
    # Only what the sizes depend on, so that the cache serves other batches and ranks as well.
    lengths = {name: getattr(config.data, name) for name in ("caption_length", "dialogue_length")}
    sizes = Config(model=config.model, objective=config.objective, data=DataConfig(**lengths))
    one, two = _for_one_and_two(sizes, with_image, precision)
    return Activations(*(a + (b - a) * (samples - 1) for a, b in zip(one, two, strict=True)))


class _NoTrunk(nn.Module):
    """Replaces the trunk: it has no blocks."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """The sequence unchanged."""
        return x


class _NoProducts(TorchDispatchMode):
    """Replaces the results of matrix products by zeros of the same shape and type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run all other operations unchanged."""
        if func.overloadpacket not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        left, right = args[-2:]
        return left.new_zeros((*left.shape[:-1], right.shape[-1]))


_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class _ScanShapes(torch.autograd.Function):
    """Allocates what mamba_ssm's chunked scan allocates, and computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int
    ) -> Tensor:
        b, length, h, _ = x.shape
        q = min(chunk_size, length)
        dA_cumsum = x.new_empty((b, h, -(-length // q), q), dtype=torch.float32)
        y = torch.empty_like(x)
        ctx.save_for_backward(y, x, dt, dA_cumsum, A, B, C)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, x, dt, dA_cumsum, A, B, C = ctx.saved_tensors
        b, chunks = x.shape[0], dA_cumsum.shape[2]
        states = x.new_empty((b, chunks, *x.shape[2:], B.shape[3]), dtype=torch.float32)
        grads = [torch.empty_like(t) for t in (x, dt, A, B, C)]
        del states
        return (*grads, None)


class _ConvShapes(torch.autograd.Function):
    """Allocates what causal-conv1d allocates, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _scan(x: Tensor, *inputs: Tensor, chunk_size: int, seq_idx: None = None) -> Tensor:
    y: Tensor = _ScanShapes.apply(x, *inputs, chunk_size)  # type: ignore[no-untyped-call]
    return y


def _conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: None = None) -> Tensor:
    y: Tensor = _ConvShapes.apply(x.contiguous(), weight, bias)  # type: ignore[no-untyped-call]
    return y
