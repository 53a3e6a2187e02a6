"""Keyed permutations that are the same on every machine and with every version of numpy.

Only the raw streams of its bit generators are promised not to change; what is drawn from them is
computed here.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_TURNS = 6


def key_of(*words: object) -> bytes:
    """A 16-byte key of these words."""
    return hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest()


def shuffled(n: int, key: bytes, stream: int = 0) -> NDArray[np.int64]:
    """A random order of range(n); another one for every stream of the key."""
    bits = np.random.Philox(key=int.from_bytes(key, "little"), counter=[0, 0, stream, 0])
    order: NDArray[np.int64] = np.argsort(bits.random_raw(n), kind="stable")
    return order


def permute(index: int, n: int, key: bytes) -> int:
    """Where a keyed permutation of range(n) sends `index`, without making the permutation.

    A Feistel network over the next even power of two, walked along its cycle until it is below n.
    """
    half = _half(n)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_TURNS):
            left, right = right, left ^ (_mixed(right, turn, key) & mask)
        index = left << half | right
        if index < n:
            return index


def unpermute(index: int, n: int, key: bytes) -> int:
    """What `permute` sends to `index`: the network run backwards."""
    half = _half(n)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in reversed(range(_TURNS)):
            left, right = right ^ (_mixed(left, turn, key) & mask), left
        index = left << half | right
        if index < n:
            return index


def _half(n: int) -> int:
    return max(1, ((n - 1).bit_length() + 1) // 2)


def _mixed(value: int, turn: int, key: bytes) -> int:
    data = value.to_bytes(8, "little") + bytes([turn])
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
