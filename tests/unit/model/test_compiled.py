"""Compiled functions in separate processes that share a cache on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
