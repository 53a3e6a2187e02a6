"""Reusable memory.

Read and collated data lives for a few steps. In memory that is fresh from the kernel each time,
page faults cost more than copying the bytes.
"""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

SPARE = 64 << 20  # unused bytes kept for each size
_SMALLEST = 128 << 10  # below this, the allocator itself keeps what it frees


class Buffers:
    """Lends memory and takes it back when nothing refers to it any more; thread-safe."""

    def __init__(self, spare: int = SPARE) -> None:
        self._spare = spare
        self._free: dict[int, deque[bytearray]] = {}

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """u8 [nbytes] with arbitrary content; arrays, memoryviews and tensors over it keep it."""
        if nbytes < _SMALLEST:
            return np.empty(nbytes, np.uint8)
        # Rounded up to an eighth of a power of two: record batches differ a little in size.
        step = 1 << nbytes.bit_length() - 4
        size = -(-nbytes // step) * step
        # Without a lock: appending to and popping from a bounded deque are atomic, and memory may
        # come back in the middle of any statement, even of one that holds the lock.
        if (free := self._free.get(size)) is None:
            free = self._free.setdefault(size, deque(maxlen=max(1, self._spare // size)))
        try:
            memory = free.pop()
        except IndexError:
            memory = bytearray(size)
        # Views of this array have it as their base, so it lives as long as any of them.
        lent = np.frombuffer(memory, np.uint8, nbytes)
        weakref.finalize(lent, free.append, memory).atexit = False
        return lent


BUFFERS = Buffers()  # of this process
