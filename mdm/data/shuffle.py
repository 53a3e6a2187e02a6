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


class Permutation:
    """A keyed permutation of range(n), both ways, without making all of it.

    A Feistel network over the next even power of two, walked along its cycle until it is below n.
    Its round functions are remembered: they take 2^h values of h = half the bits each.
    """

    def __init__(self, n: int, key: bytes) -> None:
        self.n = n
        self._key = key
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._rounds: list[dict[int, int]] = [{} for _ in range(_TURNS)]

    def at(self, index: int) -> int:
        """Where `index` is sent."""
        half, mask = self._half, self._mask
        while True:
            left, right = index >> half, index & mask
            for turn in range(_TURNS):
                left, right = right, left ^ self._mixed(right, turn)
            index = left << half | right
            if index < self.n:
                return index

    def source(self, index: int) -> int:
        """What is sent to `index`: the network run backwards."""
        half, mask = self._half, self._mask
        while True:
            left, right = index >> half, index & mask
            for turn in reversed(range(_TURNS)):
                left, right = right ^ self._mixed(left, turn), left
            index = left << half | right
            if index < self.n:
                return index

    def _mixed(self, value: int, turn: int) -> int:
        known = self._rounds[turn]
        if (found := known.get(value)) is None:
            data = value.to_bytes(8, "little") + bytes([turn])
            digest = hashlib.blake2b(data, digest_size=8, key=self._key).digest()
            found = known[value] = int.from_bytes(digest, "little") & self._mask
        return found
