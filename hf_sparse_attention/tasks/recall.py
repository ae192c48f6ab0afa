"""MQMTAR, multi-query multi-token associative recall: pairs of a key and a value, each of two tokens, are hidden in a
haystack; four keys are asked at once. Vasylenko et al. 2025 (arXiv 2506.16640)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .random_bits import RandomBits
from .samples import FIRST, Samples, SyntheticTask, prompt_and_answer

# Tokens beside the alphabet: between key and value, after a value or a key that is asked, and in the haystack.
COLON, BAR, FILLER, LETTER = FIRST, FIRST + 1, FIRST + 2, FIRST + 3
# Tokens of a pair, and of a value or a key that is asked: two letters and their mark each.
PAIR, ITEM = 6, 3
# Pairs that decide for training or testing.
LEAD = 4


@lru_cache
def _dictionary(alphabet: int, entries: int) -> np.ndarray:
    """`entries` different pairs of letters (entries, 2), the same in every sample."""
    order = np.argsort(RandomBits(f"dictionary {alphabet}").words((alphabet * alphabet,)), kind="stable")[:entries]
    return np.stack([order // alphabet, order % alphabet], axis=1)


@dataclass(frozen=True)
class MultiQueryRecall(SyntheticTask):
    """`BOS haystack SEP answer EOS` where the haystack has n tokens and its questions follow it, see below. Length n.

    The haystack holds `floor(share * n / 6)` pairs `k k : v v |` and else fillers `.`, in any order, all equally
    likely. Keys are different entries of a dictionary of `entries` out of all pairs of letters, values are any
    entries of it. After the haystack stand `queries` of its keys as `k k |`, different ones in any order; the answer
    has their values as `v v |` in that order.

    With letters a to d and two queries: `BOS . a b : c c | d a : b d | . . d a | a b | SEP` is answered by
    `b d | c c | EOS`.

    The paper gives the task, the alphabet of 256, the 10,000 entries, 80 % pairs, four queries and that the answer
    is asked in one piece; the marks, the fillers and the order are our choice. With them a model that knows all but
    which pair is asked for has a loss of 4 log(pairs) / 13, 0.54 on lengths 32 to 64; others report that their runs
    wait at 0.53 to 0.55.
    """

    alphabet: int = 256
    entries: int = 10_000
    share: float = 0.8
    queries: int = 4
    name = "mqmtar"

    def __post_init__(self):
        if self.alphabet < 2 or not 1 <= self.entries <= self.alphabet**2:
            raise ValueError(
                f"alphabet is {self.alphabet}, entries {self.entries}; entries are at most the square of the alphabet"
            )
        if not 0 < self.share <= 1 or abs(1000 * self.share - round(1000 * self.share)) > 1e-9 or self.queries < 1:
            raise ValueError(
                f"share is {self.share}, queries {self.queries}; they are whole thousandths up to 1 and at least 1"
            )

    @property
    def vocabulary(self) -> int:
        return LETTER + self.alphabet

    @property
    def shortest(self) -> int:
        length = 1
        while self._pairs(length) < self.queries:
            length += 1
        return length

    def _pairs(self, length):
        # In whole thousandths, so that no machine rounds 0.8 * 60 another way.
        return round(1000 * self.share) * length // (1000 * PAIR)

    def check_lengths(self, lengths: tuple[int, int]) -> tuple[int, int]:
        low, high = super().check_lengths(lengths)
        if self._pairs(high) > self.entries:
            raise ValueError(
                f"length {high} has {self._pairs(high):,} pairs, but there are only {self.entries:,} different keys"
            )
        return low, high

    def width(self, length: int) -> int:
        return length + 2 * ITEM * self.queries + 3

    def lead(self, bits: RandomBits, lengths: np.ndarray) -> np.ndarray:
        keys = self._different(bits, len(lengths), LEAD)
        values = bits.below(self.entries, keys.shape)
        known = np.arange(keys.shape[1]) < self._pairs(lengths)[:, None]
        return np.concatenate([np.where(known, keys, -1), np.where(known, values, -1)], axis=1)

    def complete(self, bits: RandomBits, lengths: np.ndarray, lead: np.ndarray, width: int) -> Samples:
        rows, longest = len(lengths), width - 2 * ITEM * self.queries - 3
        counts, most = self._pairs(lengths), int(self._pairs(longest))
        given = min(LEAD, most, lead.shape[1] // 2)
        keys = self._different(bits, rows, most, lead[:, :given])
        values = bits.below(self.entries, (rows, most))
        values[:, :given] = lead[:, lead.shape[1] // 2 :][:, :given]

        # Items, pairs and fillers, in random order: the counts[i] smallest of the random words are pairs.
        items = counts + lengths - PAIR * counts
        widest = int(items.max())
        words = bits.words((rows, widest)) >> np.uint64(1)
        words[np.arange(widest) >= items[:, None]] = np.iinfo(np.uint64).max
        rank = np.argsort(np.argsort(words, axis=1, kind="stable"), axis=1, kind="stable")
        is_pair = rank < counts[:, None]
        sizes = np.where(is_pair, PAIR, 1)
        starts = np.cumsum(sizes, axis=1) - sizes
        row, item = np.nonzero(is_pair)
        place, number = starts[row, item], (np.cumsum(is_pair, axis=1) - 1)[row, item]

        letters = LETTER + _dictionary(self.alphabet, self.entries)
        prompt = np.full((rows, longest + ITEM * self.queries), FILLER, dtype=np.int64)
        key, value = letters[keys[row, number]], letters[values[row, number]]
        colon, bar = np.full(len(row), COLON), np.full(len(row), BAR)
        for offset, token in enumerate([key[:, 0], key[:, 1], colon, value[:, 0], value[:, 1], bar]):
            prompt[row, place + offset] = token

        asked = self._asked(bits, counts, most)
        every = np.arange(rows)[:, None]
        answer = np.full((rows, ITEM * self.queries), BAR, dtype=np.int64)
        for offset in range(2):
            column = ITEM * np.arange(self.queries) + offset
            prompt[every, lengths[:, None] + column] = letters[keys[every, asked]][..., offset]
            answer[:, column] = letters[values[every, asked]][..., offset]
        prompt[every, lengths[:, None] + ITEM * np.arange(self.queries) + 2] = BAR
        answer_sizes = np.full(rows, answer.shape[1])
        tokens, targets = prompt_and_answer(prompt, lengths + ITEM * self.queries, answer, answer_sizes, width)
        return Samples(tokens, targets, lengths)

    def _asked(self, bits: RandomBits, counts: np.ndarray, most: int) -> np.ndarray:
        """Numbers (rows, queries) of different pairs."""
        words = bits.words((len(counts), most)) >> np.uint64(1)
        words[np.arange(most) >= counts[:, None]] = np.iinfo(np.uint64).max
        return np.argsort(words, axis=1, kind="stable")[:, : self.queries]

    def _different(self, bits: RandomBits, rows: int, count: int, given: np.ndarray | None = None) -> np.ndarray:
        """Entries (rows, count), no two of a row alike, that begin with the given ones."""
        count = min(count, self.entries)
        given = np.empty((rows, 0), dtype=np.int64) if given is None else given
        if count * count > self.entries:
            # So many that drawing until all differ would not end: an order of all entries, the given ones first.
            words = bits.words((rows, self.entries)) >> np.uint64(1)
            words |= np.uint64(2**40)
            row, column = np.nonzero(given >= 0)
            words[row, given[row, column]] = column
            return np.argsort(words, axis=1, kind="stable")[:, :count]
        entries = np.empty((rows, count), dtype=np.int64)
        left = np.arange(rows)
        while len(left):
            drawn = bits.below(self.entries, (len(left), count))
            first = drawn[:, : given.shape[1]]
            drawn[:, : given.shape[1]] = np.where(given[left] >= 0, given[left], first)
            entries[left] = drawn
            ordered = np.sort(drawn, axis=1)
            left = left[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
        return entries
