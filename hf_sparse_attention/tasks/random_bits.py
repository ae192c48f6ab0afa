"""A name and a block number -> random numbers that are the same in every process, on every machine and with every
version of NumPy: raw words of the Philox counter (Salmon et al. 2011), whose stream NumPy promises to keep, and
arithmetic of our own. A leaf."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_HALF = np.uint64(32)


class RandomBits:
    """The stream of one block of a named source; two names, or two blocks, share nothing.

    Args:
        name: any text; its SHA-256 is the key.
        block: which part of the source, from 0.
    """

    def __init__(self, name: str, block: int = 0):
        digest = hashlib.sha256(name.encode()).digest()
        key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
        self._source = np.random.Philox(counter=np.array([0, 0, block, 0], dtype=np.uint64), key=key)

    def words(self, shape: Sequence[int]) -> np.ndarray:
        """Uniform uint64 of a shape."""
        return self._source.random_raw(int(np.prod(shape, dtype=np.int64))).reshape(shape)

    def below(self, bound: int | np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Uniform int64 in [0, bound), bound at most 2^31 and broadcast to shape.

        `floor(word / 2^32 * bound / 2^32)`: no number is more likely than another by more than bound / 2^32.
        """
        bound = np.asarray(bound, dtype=np.uint64)
        return (((self.words(shape) >> _HALF) * bound) >> _HALF).astype(np.int64)


def hashed(rows: np.ndarray) -> np.ndarray:
    """A uint64 per row (rows, columns) of int64: equal rows have equal hashes on every machine.

    Each column is added and mixed as in SplitMix64 (Steele et al. 2014).
    """
    state = np.full(rows.shape[0], 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in rows.T.astype(np.uint64):
        state = state + column + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
