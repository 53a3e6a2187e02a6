"""The shapes at which scan and block are measured, and the matrix products they need."""

import math
from typing import NamedTuple

from mdm.config import ModelConfig
from mdm.kernels.ssd import chunk_length


class Shape(NamedTuple):
    """A batch of sequences of one width; the other sizes of the mixer are mamba_ssm's defaults."""

    batch: int
    length: int
    width: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(d_model=self.width, n_layer=1, kernel="compiled", chunk_size=CHUNK)

    @property
    def heads(self) -> int:
        return self.config.expand * self.width // self.config.headdim

    @property
    def chunk(self) -> int:
        """Tokens per chunk of the scan."""
        return chunk_length(self.length, CHUNK)

    def __str__(self) -> str:
        return f"batch {self.batch}, length {self.length}, width {self.width}"


CHUNK = 128
SHAPES = (Shape(64, 20, 128), Shape(32, 84, 256), Shape(4, 289, 512), Shape(1, 289, 2048))


def scan_products(shape: Shape) -> list[tuple[int, int, int, int]]:
    """(batch, m, k, n) of the matrix products of the scan, at the chunk size that it uses."""
    n, p, h = shape.config.d_state, shape.config.headdim, shape.heads
    q = shape.chunk
    chunks = math.ceil(shape.length / q)
    bc = shape.batch * chunks
    inside = [(bc, q, n, q), (bc * h, q, q, p)]
    return inside if chunks == 1 else [*inside, (bc * h, p, q, n), (bc * h, q, n, p)]


def projections(shape: Shape) -> list[tuple[int, int, int, int]]:
    """(batch, m, k, n) of the input and output projections of the mixer."""
    tokens, inner = shape.batch * shape.length, shape.config.expand * shape.width
    into = 2 * inner + 2 * shape.config.d_state + shape.heads
    return [(1, tokens, shape.width, into), (1, tokens, inner, shape.width)]
