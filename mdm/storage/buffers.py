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
_free: dict[int, deque[bytearray]] = {}  # unused memory by size


def take(nbytes: int) -> NDArray[np.uint8]:
    """Lends u8 [nbytes] with arbitrary content; thread-safe.

    It comes back when no array, memoryview or tensor over it is left.
    """
    if nbytes < _SMALLEST:
        return np.empty(nbytes, np.uint8)
    # Rounded up to an eighth of a power of two: record batches differ a little in size.
    step = 1 << nbytes.bit_length() - 4
    size = -(-nbytes // step) * step
    # Without a lock: appending to and popping from a bounded deque are atomic, and memory may
    # come back in the middle of any statement, even of one that holds the lock.
    if (free := _free.get(size)) is None:
        free = _free.setdefault(size, deque(maxlen=max(1, SPARE // size)))
    try:
        memory = free.pop()
    except IndexError:
        memory = bytearray(size)
    # Views of this array have it as their base, so it lives as long as any of them.
    lent = np.frombuffer(memory, np.uint8, nbytes)
    weakref.finalize(lent, free.append, memory).atexit = False
    return lent
