"""`torch.compile` with a disk cache that survives killed processes and other vector units."""

import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_LINKING = 20.0  # seconds after which an incomplete library is no longer being written


@cache
def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, compiled at its first call with each set of shapes; made once a process."""
    _prepare()
    return torch.compile(function, dynamic=False, fullgraph=True)


@cache
def _prepare() -> None:
    """Prepare the cache, once a process, before anything is compiled or read from it."""
    # Imported here: they take a second, and only compiled blocks need them.
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    _remove_torn(Path(cache_dir()))
    # The cache's key omits the vector units for which a graph was compiled. A graph for AVX2 writes
    # out of bounds if its buffers are laid out for AVX-512.
    config = torch.compiler.config
    config.cache_key_tag += str(pick_vec_isa())


def _remove_torn(folder: Path) -> None:
    """Remove libraries that a killed process left incomplete: loading one crashes the job.

    Wait for libraries that another process is still writing.
    """
    for library in folder.rglob("*.so"):
        try:
            while not _is_whole(library):
                if time.time() - library.stat().st_mtime > _LINKING:
                    library.unlink()
                    break
                time.sleep(0.2)
        except FileNotFoundError:
            continue  # another process has removed it


def _is_whole(library: Path) -> bool:
    """Whether a 64-bit ELF file contains all of its section table, which comes last."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64:
        return False
    (start,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return bool(library.stat().st_size >= start + size * count)
