"""Memory that is used again.

What is read or collated lives for a few steps. Taken fresh from the kernel each time, its pages
cost more (a fault each) than the bytes that are copied into them.
"""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

SPARE = 64 << 20  # bytes of a size that are kept while nobody uses them
_SMALLEST = 128 << 10  # below, the allocator itself keeps what it frees


class Buffers:
    """Gives memory out, and takes it back when nothing refers to it any more; thread-safe."""

    def __init__(self, spare: int = SPARE) -> None:
        self._spare = spare
        self._free: dict[int, deque[bytearray]] = {}

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """u8 [nbytes] of any content; arrays, memoryviews and tensors over it keep it."""
        if nbytes < _SMALLEST:
            return np.empty(nbytes, np.uint8)
        size = _rounded(nbytes)
        # Appending, popping and dropping what is too much are atomic: a lock could be met again
        # by the same thread, since memory may be given back in the middle of anything.
        if (free := self._free.get(size)) is None:
            free = self._free.setdefault(size, deque(maxlen=max(1, self._spare // size)))
        try:
            block = free.pop()
        except IndexError:
            block = bytearray(size)
        # Views of this array have it as their base: it lives as long as any of them.
        given = np.frombuffer(block, np.uint8, nbytes)
        weakref.finalize(given, free.append, block).atexit = False
        return given


def _rounded(nbytes: int) -> int:
    """The next eighth of a power of two: successive record batches differ a little in size."""
    step = 1 << max(0, nbytes.bit_length() - 4)
    return -(-nbytes // step) * step


BUFFERS = Buffers()  # of this process
