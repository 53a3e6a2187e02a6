"""`torch.compile` over a cache on disk that kills and other vector units may have spoilt."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_TRIES = 4  # several ranks may mend the same file
_BROKEN_FILE = re.compile(r"(?:^|ImportError: )(/.+?\.so): ")


class Compiled(Generic[P, T]):
    """`function` compiled, at its first call with each set of shapes.

    A process that was killed while it compiled leaves half a library in the cache, which every
    later one would try to load: it is removed and compiled again.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        self._function = function
        self._run: Callable[P, T] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result."""
        for left in reversed(range(_TRIES)):
            if self._run is None:
                _keep_units_apart()
                self._run = torch.compile(self._function, dynamic=False)
            try:
                return self._run(*args, **kwargs)
            except (ImportError, RuntimeError) as error:
                broken = _BROKEN_FILE.search(str(error))
                if broken is None or not left:
                    raise
            Path(broken[1]).unlink(missing_ok=True)
            torch.compiler.reset()
            self._run = None
        raise AssertionError("unreachable")


def _keep_units_apart() -> None:
    """Have the cache of compiled graphs tell for which vector units they were made.

    torch's key leaves it out. A graph for AVX2 that is used where buffers are laid out for AVX-512
    writes out of bounds.
    """
    # Imported here: it takes a second, and only compiled blocks need it.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    config = torch.compiler.config
    units = str(pick_vec_isa())
    if units not in config.cache_key_tag:
        config.cache_key_tag += units
