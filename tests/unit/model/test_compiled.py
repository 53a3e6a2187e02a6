"""Compiled blocks, and compiled functions in processes that share a cache on disk."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from mdm.config import ModelConfig
from mdm.model.compiled import compiled
from mdm.model.decoder import Block
from mdm.model.mamba2 import mix
from mdm.model.sequence import Order

CALL = """
import torch
from mdm.model.compiled import compiled
x = torch.arange(64.0, requires_grad=True)
y = compiled(lambda x: (x.sin() * x).sum())(x)
y.backward()
assert torch.allclose(x.grad, x.cos() * x + x.sin())
print(torch.compiler.config.cache_key_tag)
"""


def call(cache: Path, **env: str) -> str:
    """Call a compiled function with this cache; returns the tag in the cache's keys."""
    return subprocess.run(
        [sys.executable, "-c", CALL],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **env},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def differentiated(block: Block, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The output of `block`, and the gradients of its input and parameters."""
    inputs = {"x": x} | dict(block.named_parameters())
    weighted = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    gradients = torch.autograd.grad(weighted, [*inputs.values()])
    return {"y": y.detach()} | dict(zip(inputs, gradients, strict=True))


# Both are of torch, inside its own compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_block_has_the_output_and_gradients_of_plain_indexing(monkeypatch):
    # Traced, but not translated to C++, which takes half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_state": 8, "headdim": 8, "chunk_size": 4}
    block = Block(ModelConfig(**sizes, n_layer=1, n_classes=3, kernel="compiled"), 2)
    torch.nn.init.normal_(block.modulation)
    modulation = torch.randn(2, 6, 48)
    order = torch.stack([torch.randperm(6), torch.arange(6)], 1)
    scan = Order(order, order.argsort(0))
    x = torch.randn(2, 6, 16, requires_grad=True)
    shift, scale, gate = (modulation + block.modulation).chunk(3, -1)
    u = (rms_norm(x, x.shape[-1:], block.norm, eps=1e-5) * (1 + scale) + shift)[:, order]
    mixed = mix(u, block.mixer.weights, None, **block.mixer.settings)
    y = x + (1 + gate) * sum(mixed[:, scan.inverse[:, k], k] for k in range(2)) / 2
    plain = differentiated(block, y, x)
    compiled.cache_clear()
    try:
        traced = differentiated(block, block(x, scan, None, modulation), x)
    finally:
        compiled.cache_clear()
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_library_that_a_kill_left_incomplete_is_compiled_again(tmp_path):
    call(tmp_path)
    libraries = list(tmp_path.rglob("*.main.so"))
    assert libraries
    sizes = [library.stat().st_size for library in libraries]
    for library, size in zip(libraries, (0, 3000), strict=False):
        with library.open("r+b") as file:
            file.truncate(size)
        os.utime(library, (0, 0))
    call(tmp_path)
    assert [library.stat().st_size for library in libraries] == sizes


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="it has one kind of vector units"
)
def test_graphs_for_other_vector_units_are_kept_apart(tmp_path):
    own = {"TORCH_COMPILE_CACHE_KEY_TAG": "own"}
    tags = {call(tmp_path, ATEN_CPU_CAPABILITY=units, **own) for units in ("avx2", "avx512")}
    assert len(tags) == 2
    assert all(tag.startswith("own") for tag in tags)
