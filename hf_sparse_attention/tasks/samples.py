"""Samples of a synthetic task: what all tasks share. A task draws the lead of a sample, its first random choices, and
completes it; the hash of the lead alone says whether a sample is for training, validation or testing, so that no
sample of one can occur in another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import numpy as np

from .random_bits import RandomBits, hashed

# Tokens that every task has; symbols of a task come after them.
PAD, BOS, SEP, EOS, FIRST = 0, 1, 2, 3, 4
# Stands in targets where nothing is asked; the index that cross_entropy ignores.
NO_TARGET = -100
# Samples whose lead hashes to 0 modulo this are tested, to 1 validated on, all others trained on.
CLASSES = 32
SPLITS = {"test": (0, 1), "validation": (1, 2), "train": (2, CLASSES)}
# Fixed sets are made in blocks of so many samples: the first ones of a set do not depend on its size.
BLOCK = 50
_ROUNDS = 200


@dataclass(frozen=True)
class Samples:
    """Samples side by side, padded on the right, which causal attention does not see.

    Args:
        tokens: int64 (samples, width), PAD after the end.
        targets: int64 (samples, width): what the logits at a position must say, having read the tokens up to it;
            NO_TARGET where nothing is asked.
        lengths: int64 (samples,), the task's length of each.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows) -> Samples:
        return Samples(self.tokens[rows], self.targets[rows], self.lengths[rows])


@dataclass(frozen=True)
class SyntheticTask:
    """A task; its fields say which one exactly.

    A subclass has `name`, `version`, `shortest` (length), `default_lengths` (of training), `tags` (whether the input
    is given and each of its tokens is answered, rather than an answer that follows a prompt), `vocabulary` (number
    of tokens) and the methods below.
    """

    name = ""
    # Raised whenever the same seed would give other samples.
    version = 1
    shortest = 1
    default_lengths = (32, 64)
    tags = False

    @property
    def vocabulary(self) -> int:
        raise NotImplementedError

    def width(self, length: int) -> int:
        """Tokens of a sample of a length."""
        raise NotImplementedError

    def lead(self, bits: RandomBits, lengths: np.ndarray) -> np.ndarray:
        """First choices (samples, choices) of samples of these lengths; -1 where a sample has no such choice.

        It must follow from the finished sample.
        """
        raise NotImplementedError

    def complete(self, bits: RandomBits, lengths: np.ndarray, lead: np.ndarray, width: int) -> Samples:
        """The samples that begin with these leads, `width` tokens wide."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """What determines the samples, apart from seed and length."""
        return json.dumps([self.name, self.version, asdict(self)])

    def training_batch(
        self, step: int, *, seed: int = 0, batch: int = 128, lengths: tuple[int, int] | None = None
    ) -> Samples:
        """Batch number `step` of the endless training stream of a seed: a function of both, so nothing is to be saved.

        Lengths are uniform from the first of `lengths` to the last; the width is always that of the longest.
        """
        low, high = self.check_lengths(lengths or self.default_lengths)
        bits = RandomBits(f"{self.identity}|train|{seed}|{low}-{high}|{batch}", step)
        return self._draw(bits, batch, low, high, "train")

    def fixed_blocks(self, length: int, count: int = 1000, *, split: str = "test") -> Iterator[Samples]:
        """The fixed set of a length, in parts of at most `BLOCK` samples."""
        low, high = self.check_lengths((length, length))
        for block in range(-(-count // BLOCK)):
            bits = RandomBits(f"{self.identity}|{split}|{length}", block)
            yield self._draw(bits, BLOCK, low, high, split)[: count - block * BLOCK]

    def fixed_set(self, length: int, count: int = 1000, *, split: str = "test") -> Samples:
        """The fixed set of a length, whole."""
        blocks = list(self.fixed_blocks(length, count, split=split))
        return Samples(*(np.concatenate([getattr(part, item.name) for part in blocks]) for item in fields(Samples)))

    def check_lengths(self, lengths: tuple[int, int]) -> tuple[int, int]:
        """Raises ValueError for lengths the task does not have."""
        low, high = lengths
        if not self.shortest <= low <= high:
            raise ValueError(f"lengths are {low} to {high}; {self.name} takes lengths from {self.shortest}, in order")
        return low, high

    def _draw(self, bits: RandomBits, rows: int, low: int, high: int, split: str) -> Samples:
        first, last = SPLITS[split]
        lengths, leads, found = [], [], 0
        for _ in range(_ROUNDS):
            pool = (rows - found) * CLASSES // (last - first) * 9 // 8 + 8
            drawn = low + bits.below(high - low + 1, (pool,))
            lead = self.lead(bits, drawn)
            kind = hashed(lead) % np.uint64(CLASSES)
            kept = (kind >= first) & (kind < last)
            lengths.append(drawn[kept])
            leads.append(lead[kept])
            found += int(kept.sum())
            if found >= rows:
                break
        else:
            raise ValueError(
                f"{self.name} has too few different samples of length {low} to {high} to keep some of them for "
                f"{split}: take longer ones, or more symbols"
            )
        lengths, leads = np.concatenate(lengths)[:rows], np.concatenate(leads)[:rows]
        return self.complete(bits, lengths, leads, self.width(high))


def prompt_and_answer(prompt: np.ndarray, sizes: np.ndarray, answer: np.ndarray, answer_sizes: np.ndarray, width: int):
    """BOS, the first `sizes` tokens of each prompt, SEP, the first `answer_sizes` of each answer, EOS -> tokens and
    targets (samples, width), where every token from the answer on is asked for."""
    rows = prompt.shape[0]
    tokens = np.full((rows, width), PAD, dtype=np.int64)
    row, column = np.nonzero(np.arange(prompt.shape[1]) < sizes[:, None])
    tokens[:, 0] = BOS
    tokens[row, column + 1] = prompt[row, column]
    every = np.arange(rows)
    tokens[every, sizes + 1] = SEP
    row, column = np.nonzero(np.arange(answer.shape[1]) < answer_sizes[:, None])
    tokens[row, sizes[row] + 2 + column] = answer[row, column]
    tokens[every, sizes + 2 + answer_sizes] = EOS
    targets = np.full((rows, width), NO_TARGET, dtype=np.int64)
    place = np.arange(width - 1)
    asked = (place >= sizes[:, None] + 1) & (place <= (sizes + 1 + answer_sizes)[:, None])
    targets[:, :-1][asked] = tokens[:, 1:][asked]
    return tokens, targets
