"""`torch.compile` over a cache on disk that kills and other vector units may have spoilt."""

import struct
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_LINKING = 20.0  # seconds that a library may take to be written


class Compiled(Generic[P, T]):
    """`function` compiled, at its first call with each set of shapes."""

    def __init__(self, function: Callable[P, T]) -> None:
        self._function = function
        self._run: Callable[P, T] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result."""
        if self._run is None:
            _prepare()
            self._run = torch.compile(self._function, dynamic=False)
        return self._run(*args, **kwargs)


@lru_cache(maxsize=1)
def _prepare() -> None:
    """Once a process, before anything is compiled or taken from the cache."""
    # Imported here: they take a second, and only compiled blocks need them.
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    _remove_torn(Path(cache_dir()))
    # The cache's key leaves out for which vector units a graph was compiled. One for AVX2 that is
    # used where buffers are laid out for AVX-512 writes out of bounds.
    config = torch.compiler.config
    config.cache_key_tag += str(pick_vec_isa())


def _remove_torn(folder: Path) -> None:
    """Remove libraries that a killed process left half written: loading one ends the job.

    One that another process is still writing is waited for.
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
    """Whether a 64-bit ELF file reaches to the end of its table of sections, which comes last."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64:
        return False
    (start,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return bool(library.stat().st_size >= start + size * count)
