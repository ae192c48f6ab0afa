"""2Back, LocalCount and Flip-Flop: the input is given whole, and answered at its own tokens. Sizes of Vasylenko et al.
2025 (arXiv 2506.16640) and the README of its authors; Flip-Flop of Liu et al. 2023 (arXiv 2306.00946)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .random_bits import RandomBits
from .samples import BOS, FIRST, NO_TARGET, PAD, Samples, SyntheticTask

# Choices that decide for training or testing: symbols of 2Back, runs of LocalCount, instructions of Flip-Flop.
LEAD = 16
RUNS = 4
# Instructions of Flip-Flop; their tokens come after those of the two bits.
WRITE, IGNORE, READ = range(3)


def _tagged(source: np.ndarray, sizes: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> Samples:
    """BOS and the first `sizes` tokens of each source, with a target at each of them; int64 (samples, longest)."""
    inside = np.arange(source.shape[1]) < sizes[:, None]
    tokens = np.concatenate([np.full((len(source), 1), BOS, dtype=np.int64), np.where(inside, source, PAD)], axis=1)
    targets = np.concatenate(
        [np.full((len(source), 1), NO_TARGET, dtype=np.int64), np.where(inside, targets, NO_TARGET)], axis=1
    )
    return Samples(tokens, targets, lengths)


@dataclass(frozen=True)
class TwoBack(SyntheticTask):
    """`BOS x_1 ... x_n`, the x_i independent and uniform; at x_i, i > 2, the answer is x_(i-2). Length n.

    `BOS b a c a` is answered by `b a` at its last two tokens. (The paper names the task and its 16 symbols; that the
    first two tokens are not asked is our choice.)
    """

    symbols: int = 16
    name = "2back"
    shortest = 3
    tags = True

    def __post_init__(self):
        if self.symbols < 2:
            raise ValueError(f"symbols is {self.symbols}; {self.name} needs at least 2")

    @property
    def vocabulary(self) -> int:
        return FIRST + self.symbols

    def width(self, length: int) -> int:
        return length + 1

    def lead(self, bits: RandomBits, lengths: np.ndarray) -> np.ndarray:
        lead = bits.below(self.symbols, (len(lengths), LEAD))
        return np.where(np.arange(LEAD) < lengths[:, None], lead, -1)

    def complete(self, bits: RandomBits, lengths: np.ndarray, lead: np.ndarray, width: int) -> Samples:
        source = FIRST + bits.below(self.symbols, (len(lengths), width - 1))
        source[:, :LEAD] = FIRST + lead[:, : width - 1]
        targets = np.full_like(source, NO_TARGET)
        targets[:, 2:] = source[:, :-2]
        return _tagged(source, lengths, targets, lengths)


@dataclass(frozen=True)
class LocalCount(SyntheticTask):
    """`BOS` and runs of equal symbols, cut at n tokens; at each token the answer is how often its symbol has stood in
    the run so far, itself included. Length n.

    A run's symbol differs from the one before and is else uniform; its length is uniform from 1 to `longest_run`.
    `BOS b b a c c c` is answered by `1 2 1 1 2 3`. (The paper names the task; 16 symbols, runs of up to 48 and lengths
    from 64 to 128 are from its authors' README; the law of the runs is our choice.)
    """

    symbols: int = 16
    longest_run: int = 48
    name = "local_count"
    default_lengths = (64, 128)
    tags = True

    def __post_init__(self):
        if self.symbols < 2 or self.longest_run < 1:
            raise ValueError(
                f"symbols is {self.symbols}, longest_run {self.longest_run}; {self.name} needs at least 2 and 1"
            )

    @property
    def vocabulary(self) -> int:
        return FIRST + self.symbols + self.longest_run

    def width(self, length: int) -> int:
        return length + 1

    def lead(self, bits: RandomBits, lengths: np.ndarray) -> np.ndarray:
        shape = (len(lengths), RUNS)
        step = 1 + bits.below(self.symbols - 1, shape)
        step[:, 0] = bits.below(self.symbols, shape[:1])
        counts = 1 + bits.below(self.longest_run, shape)
        starts = np.cumsum(counts, axis=1) - counts
        left = lengths[:, None] - starts
        symbols = np.where(left > 0, np.cumsum(step, axis=1) % self.symbols, -1)
        # A run that is cut counts as long as it is: the lead must follow from the sample.
        return np.concatenate([symbols, np.where(left > 0, np.minimum(counts, left), -1)], axis=1)

    def complete(self, bits: RandomBits, lengths: np.ndarray, lead: np.ndarray, width: int) -> Samples:
        longest = width - 1
        shape = (len(lengths), max(longest, RUNS))
        counts = 1 + bits.below(self.longest_run, shape)
        step = 1 + bits.below(self.symbols - 1, shape)
        # What is cut in the lead ends the sample, so that what follows it does not matter.
        counts[:, :RUNS] = np.where(lead[:, RUNS:] > 0, lead[:, RUNS:], longest)
        step[:, :RUNS] = np.diff(lead[:, :RUNS], axis=1, prepend=0)
        symbols = np.cumsum(step, axis=1) % self.symbols
        starts = np.minimum(np.cumsum(counts, axis=1) - counts, longest)
        marks = np.zeros((len(lengths), longest + 1), dtype=np.int64)
        marks[np.arange(len(lengths))[:, None], starts] = 1
        run = np.cumsum(marks[:, :longest], axis=1) - 1
        count = np.arange(longest) - np.take_along_axis(starts, run, axis=1)
        source = FIRST + np.take_along_axis(symbols, run, axis=1)
        return _tagged(source, lengths, FIRST + self.symbols + count, lengths)


@dataclass(frozen=True)
class FlipFlop(SyntheticTask):
    """`BOS` and n // 2 instructions, each followed by a bit: `w` writes it, `i` is to be ignored, `r` reads what was
    written last; at every `r` the answer is that bit. Length n.

    The first instruction is `w`, the last `r`, the others `w`, `i`, `r` with probability 0.1, 0.8, 0.1; bits after `w`
    and `i` are uniform: FFL(0.8) of Liu et al. `BOS w 1 i 0 r 1 w 0 r 0` is answered by `1` at the first `r` and `0`
    at the second. (The ASEntmax paper gives no definition; its authors' README writes with 0.8 or 0.1 and asks for the
    last bit alone. We ask for every one.)
    """

    name = "flip_flop"
    shortest = 4
    tags = True

    @property
    def vocabulary(self) -> int:
        return FIRST + 5

    def width(self, length: int) -> int:
        return length // 2 * 2 + 1

    def lead(self, bits: RandomBits, lengths: np.ndarray) -> np.ndarray:
        sizes = lengths[:, None] // 2
        kind, bit = self._instructions(bits, (len(lengths), LEAD))
        kind[:, 0] = WRITE
        kind[np.arange(LEAD) == sizes - 1] = READ
        # The bit after a read follows from what is before it.
        return np.where(np.arange(LEAD) < sizes, 2 * kind + np.where(kind == READ, 0, bit), -1)

    def complete(self, bits: RandomBits, lengths: np.ndarray, lead: np.ndarray, width: int) -> Samples:
        count = (width - 1) // 2
        sizes = lengths // 2
        kind, bit = self._instructions(bits, (len(lengths), count))
        known = np.maximum(lead[:, :count], 0)
        kind[:, :LEAD], bit[:, :LEAD] = known // 2, known % 2
        kind[np.arange(count) == sizes[:, None] - 1] = READ
        place = np.arange(count)
        last_write = np.maximum.accumulate(np.where(kind == WRITE, place, 0), axis=1)
        bit = np.where(kind == READ, np.take_along_axis(bit, last_write, axis=1), bit)
        source = np.stack([FIRST + 2 + kind, FIRST + bit], axis=-1).reshape(len(lengths), -1)
        asked = np.where(kind == READ, FIRST + bit, NO_TARGET)
        targets = np.stack([asked, np.full_like(asked, NO_TARGET)], axis=-1).reshape(len(lengths), -1)
        return _tagged(source, 2 * sizes, targets, lengths)

    def _instructions(self, bits: RandomBits, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Kinds and bits of instructions, independent of each other."""
        tenth = bits.below(10, shape)
        return np.where(tenth == 0, WRITE, np.where(tenth == 9, READ, IGNORE)), bits.below(2, shape)
