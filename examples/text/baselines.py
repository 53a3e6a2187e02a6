"""The language models that the diffusion is compared with, as large as it and of plain torch.

`Autoregressive` is a causal Transformer with rotary positions, RMSNorm and SwiGLU. `Masked` is an
absorbing-state diffusion (Sahoo et al. 2024; Nie et al. 2025) whose network is this project's own
trunk of Mamba-2 blocks over token embeddings, read in both directions. Both tie the embedding to
the output. `unigram` needs no training.

Shapes: B rows, M tokens, V vocabulary, D d_model.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mdm.config import ModelConfig
from mdm.first_stage.tokenizer import EOS
from mdm.model.decoder import Trunk
from mdm.model.sequence import FRAME, HEAD, Layout, join

ROTARY_BASE = 10_000.0
Model = TypeVar("Model", bound=nn.Module)


def unigram(train: NDArray[np.int64], tokens: NDArray[np.int64], vocab_size: int) -> Tensor:
    """-log p of rows [B, M] in nats, [B], under the frequencies of the training rows."""
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0  # every piece is possible
    log_p = torch.from_numpy(np.log(counts / counts.sum()))
    return -log_p[torch.from_numpy(tokens)].sum(1)


def parameters(model: nn.Module) -> int:
    """Trained numbers of a model."""
    return sum(p.numel() for p in model.parameters())


class _Attention(nn.Module):
    """x + causal attention, then x + SwiGLU, each of RMSNorm(x)."""

    def __init__(self, d: int, d_ff: int, n_layer: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d, bias=False)
        with torch.no_grad():  # branches start small, as the trunk's do
            for last in (self.out, self.down):
                last.weight.mul_((2 * n_layer) ** -0.5)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """[B, M, D] -> [B, M, D]; `rotation` cosines and sines [M, D / heads]."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, M, D / heads]
        q, k = (_rotate(t, *rotation) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        joined: Tensor = x + self.down(F.silu(gate) * up)
        return joined


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on [..., M, D / heads]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Autoregressive(nn.Module):
    """p(x_i | x_1 ... x_i-1), exact."""

    def __init__(self, vocab_size: int, d_model: int, n_layer: int, d_ff: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            _Attention(d_model, d_ff, n_layer, heads) for _ in range(n_layer)
        )
        self.norm = nn.RMSNorm(d_model)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.width = d_model // heads

    @classmethod
    def of_size(cls, config: ModelConfig, size: int) -> "Autoregressive":
        """The model whose number of parameters is nearest to `size`, by the width of its MLP.

        A layer has more parameters than a Mamba-2 block: it is narrower, and there are fewer.
        """
        d_model = 32 * max(config.d_model * 2 // 3 // 32, 1)
        n_layer = max(config.n_layer * 3 // 4, 1)

        def make(d_ff: int) -> "Autoregressive":
            return cls(config.vocab_size, d_model, n_layer, d_ff, d_model // 32)

        return _of_size(make, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Log p [B, M, V] of each next token, given those up to it, i64 [B, M]."""
        position = torch.arange(tokens.shape[1]).unsqueeze(1)
        frequency = ROTARY_BASE ** -(torch.arange(self.width // 2) * 2 / self.width)
        angle = (position * frequency).repeat(1, 2)
        rotation = angle.cos(), angle.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = F.linear(self.norm(x), self.embedding.weight, self.bias)
        return logits.float().log_softmax(-1)

    def nats(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """-log p of each row, [B]; nothing is drawn."""
        before = F.pad(tokens[:, :-1], (1, 0), value=EOS)  # a row begins as if after a text
        return _nll(self(before), tokens).sum(1)

    @torch.no_grad()
    def sample(self, prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Rows i64 [B, length] that begin with the prompts i64 [B, P], one token at a time."""
        tokens = F.pad(prompt, (1, 0), value=EOS)
        while tokens.shape[1] <= length:
            p = self(tokens)[:, -1].exp()
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], 1)
        return tokens[:, 1:]


class Masked(nn.Module):
    """Tokens are masked one after the other in random order; the network predicts the masked.

    With k of M tokens masked, k even over 1 ... M, the expectation of M / k times the cross-entropy
    of the masked is the negative ELBO, with the time of Sahoo et al. integrated out (Ou et al.
    2024).
    """

    def __init__(self, config: ModelConfig, d_ff: int) -> None:
        super().__init__()
        d, self.mask = config.d_model, config.vocab_size
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(config.text_length, d) * 0.02)
        self.frame = nn.Parameter(torch.randn(FRAME, d) * 0.02)
        self.trunk = Trunk(dataclasses.replace(config, adaln=False))  # no level to be told
        self.head = nn.Sequential(
            nn.RMSNorm(d), nn.Linear(d, d_ff), nn.SiLU(), nn.Linear(d_ff, d), nn.RMSNorm(d)
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    @classmethod
    def of_size(cls, config: ModelConfig, size: int) -> "Masked":
        """The model whose number of parameters is nearest to `size`, by the width of its head."""
        return _of_size(lambda d_ff: cls(config, d_ff), size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Log p [B, M, V] of each token, given those of i64 [B, M] that are not `mask`."""
        b, m = tokens.shape
        x = self.embedding(tokens) + self.position[:m]
        frame = self.frame.unsqueeze(1).expand(-1, b, -1).unsqueeze(2).unbind(0)
        layout = Layout.of(self.config, m, 0)
        y = self.trunk(join(frame[:HEAD], x, (), frame[HEAD:]), layout)
        text, _ = layout.split(y)
        logits: Tensor = F.linear(self.head(text), self.embedding.weight[: self.mask], self.bias)
        return logits.float().log_softmax(-1)

    def nats(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An unbiased estimate of the negative ELBO of each row, [B]."""
        b, m = tokens.shape
        # Low variance: the rows of a batch have evenly spread numbers of masked tokens.
        even = (torch.randperm(b, generator=generator) + torch.rand(1, generator=generator)) / b
        k = 1 + (even * m).long()  # 1 ... M
        rank = torch.rand(b, m, generator=generator).argsort(1).argsort(1)
        masked = rank < k.unsqueeze(1)
        nll = _nll(self(torch.where(masked, self.mask, tokens)), tokens)
        return (nll * masked).sum(1) * m / k

    @torch.no_grad()
    def sample(self, prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Rows i64 [B, length] that begin with the prompts i64 [B, P], one token at a time."""
        b, given = prompt.shape
        tokens = F.pad(prompt, (0, length - given), value=self.mask)
        order = given + torch.rand(b, length - given, generator=generator).argsort(1)
        for place in order.unbind(1):
            p = self(tokens)[torch.arange(b), place].exp()
            tokens[torch.arange(b), place] = torch.multinomial(p, 1, generator=generator)[:, 0]
        return tokens


def _of_size(make: Callable[[int], Model], size: int) -> Model:
    """The model with a hidden layer of the width, at least 1, that comes nearest to `size`."""
    with torch.device("meta"):
        least, next_one = (parameters(make(width)) for width in (1, 2))
    return make(max(1 + round((size - least) / (next_one - least)), 1))


def _nll(log_p: Tensor, tokens: Tensor) -> Tensor:
    return -log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
