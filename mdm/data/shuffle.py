"""Keyed permutations that are the same on every machine and with every version of numpy.

numpy guarantees only the raw streams of its bit generators; what is drawn from them is computed
here.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def key_of(*words: object) -> bytes:
    """A 16-byte key derived from these words."""
    return hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest()


def shuffled(n: int, key: bytes, stream: int = 0) -> NDArray[np.int64]:
    """A random order of range(n), a different one for each stream of the key."""
    bits = np.random.Philox(key=int.from_bytes(key, "little"), counter=[0, 0, stream, 0])
    order: NDArray[np.int64] = np.argsort(bits.random_raw(n), kind="stable")
    return order


class Permutation:
    """A keyed permutation of range(n), evaluated at one index at a time, in both directions.

    A Feistel network over the next even power of two; indices are mapped again until the result is
    below n. Round functions are memoised: they have 2^h inputs, where h is half the bits.
    """

    def __init__(self, n: int, key: bytes) -> None:
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1

        def round_function(value: int, turn: int) -> int:
            data = value.to_bytes(8, "little") + bytes([turn])
            digest = hashlib.blake2b(data, digest_size=8, key=key).digest()
            return int.from_bytes(digest, "little") & self._mask

        self._round = lru_cache(maxsize=None)(round_function)

    def at(self, index: int) -> int:
        """The image of `index`."""
        while True:
            left, right = index >> self._half, index & self._mask
            for turn in range(_ROUNDS):
                left, right = right, left ^ self._round(right, turn)
            index = left << self._half | right
            if index < self.n:
                return index

    def source(self, index: int) -> int:
        """The preimage of `index`: the same network backwards."""
        while True:
            left, right = index >> self._half, index & self._mask
            for turn in reversed(range(_ROUNDS)):
                left, right = right ^ self._round(left, turn), left
            index = left << self._half | right
            if index < self.n:
                return index
