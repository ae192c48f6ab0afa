"""Copy, Reverse and Sort: a source of random symbols enters, the same, reversed or sorted, follows as the answer.
Sizes of Vasylenko et al. 2025 (arXiv 2506.16640): 32 symbols, lengths 32 to 64, exact match of the whole answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .random_bits import RandomBits
from .samples import FIRST, Samples, SyntheticTask, prompt_and_answer

# Symbols of the source that decide for training or testing.
LEAD = 16


@dataclass(frozen=True)
class Copy(SyntheticTask):
    """`BOS x_1 ... x_n SEP x_1 ... x_n EOS`, the x_i independent and uniform; length n.

    With symbols a, b, c: `BOS b a c a SEP` is answered by `b a c a EOS`.
    """

    symbols: int = 32
    name = "copy"

    def __post_init__(self):
        if self.symbols < 2:
            raise ValueError(f"symbols is {self.symbols}; {self.name} needs at least 2")

    @property
    def vocabulary(self) -> int:
        return FIRST + self.symbols

    def width(self, length: int) -> int:
        return 2 * length + 3

    def lead(self, bits: RandomBits, lengths: np.ndarray) -> np.ndarray:
        lead = bits.below(self.symbols, (len(lengths), LEAD))
        return np.where(np.arange(LEAD) < lengths[:, None], lead, -1)

    def complete(self, bits: RandomBits, lengths: np.ndarray, lead: np.ndarray, width: int) -> Samples:
        longest = (width - 3) // 2
        source = bits.below(self.symbols, (len(lengths), longest))
        source[:, :LEAD] = lead[:, :longest]
        answer = self.answer(np.where(np.arange(longest) < lengths[:, None], source, self.symbols), lengths)
        return Samples(*prompt_and_answer(FIRST + source, lengths, FIRST + answer, lengths, width), lengths)

    def answer(self, source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Sources (samples, longest), `symbols` after the end of each -> answers, anything after their end."""
        return source


@dataclass(frozen=True)
class Reverse(Copy):
    """`BOS x_1 ... x_n SEP x_n ... x_1 EOS`.

    `BOS b a c a SEP` is answered by `a c a b EOS`.
    """

    name = "reverse"

    def answer(self, source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        back = lengths[:, None] - 1 - np.arange(source.shape[1])
        return np.take_along_axis(source, np.maximum(back, 0), axis=1)


@dataclass(frozen=True)
class Sort(Copy):
    """`BOS x_1 ... x_n SEP`, then the x_i in ascending order and EOS.

    `BOS b a c a SEP` is answered by `a a b c EOS`.
    """

    name = "sort"

    def answer(self, source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        # What stands after the end is larger than any symbol.
        return np.sort(source, axis=1)
