"""A training stream of a synthetic task -> arrays of several batches each, laid out as a step reads them: a sample a
row, or several side by side, which saves their padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .random_bits import RandomBits
from .samples import NO_TARGET, PAD, Samples, SyntheticTask

# Batches of an array: what a step costs the host is mostly paid once for all of them.
CHUNK = 16
# Widest row of several samples: up to here attention is computed by the kernels for few keys.
_WIDEST = 256
# Batches that a layout is tried on, the share of them that must fit, and the least that another sample in a row must
# save.
_TRIED, _FIT, _SAVES = 2000, 0.999, 0.04


@dataclass(frozen=True)
class Layout:
    """Rows and width of a batch.

    Args:
        packed: whether rows hold several samples, each counting its positions from 0; an array then has three planes,
            tokens, targets and positions, else the first two.
    """

    rows: int
    width: int
    packed: bool = False

    @property
    def planes(self) -> int:
        return 3 if self.packed else 2


@lru_cache
def packed_layout(task: SyntheticTask, batch: int, lengths: tuple[int, int]) -> Layout:
    """The layout in which a batch has the fewest tokens, in rows so wide that all but one of a thousand fit."""
    low, high = lengths
    bits = RandomBits(f"layout of {batch} samples of lengths {low} to {high}")
    sizes = task.width(low + bits.below(high - low + 1, (_TRIED, batch)))
    best = Layout(batch, task.width(high))
    for each in range(2, batch + 1):
        rows = -(-batch // each)
        fullest = np.quantile([_places(row, rows)[2].max() for row in sizes], _FIT)
        # A multiple of 4 keeps planes and rows aligned.
        width = -(-math.ceil(fullest) // 4) * 4
        if width > _WIDEST:
            break
        if rows * width < (1 - _SAVES) * best.rows * best.width:
            best = Layout(rows, width, packed=True)
    return best


def _places(sizes: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes (samples,) -> row and first column of each sample, and tokens in each row: in turns, from the longest, the
    longest to the emptiest row."""
    order = np.argsort(-sizes, kind="stable")
    row, column, fill = np.empty_like(sizes), np.empty_like(sizes), np.zeros(rows, dtype=sizes.dtype)
    for first in range(0, len(sizes), rows):
        part = order[first : first + rows]
        emptiest = np.argsort(fill, kind="stable")[: len(part)]
        row[part], column[part] = emptiest, fill[emptiest]
        fill[emptiest] += sizes[part]
    return row, column, fill


def laid_out(task: SyntheticTask, samples: Samples, layout: Layout, dtype=np.int64) -> np.ndarray:
    """Samples -> (planes, rows, width); in a layout of their own, a sample a row, if they do not fit."""
    sizes = task.width(samples.lengths)
    if layout.packed:
        row, column, fill = _places(sizes, layout.rows)
        if fill.max() > layout.width:
            layout = Layout(*samples.tokens.shape, packed=True)
    if not layout.packed:
        return np.stack([samples.tokens, samples.targets]).astype(dtype)
    if (layout.rows, layout.width) == samples.tokens.shape:
        row, column = np.arange(len(samples)), np.zeros_like(sizes)
    found = np.empty((3, layout.rows * layout.width), dtype=dtype)
    # What is behind the last sample of a row is many samples of one token, which nothing else sees.
    found[0], found[1], found[2] = PAD, NO_TARGET, 0
    inside = np.arange(samples.tokens.shape[1]) < sizes[:, None]
    place = np.arange(samples.tokens.shape[1])
    target = ((row * layout.width + column)[:, None] + place)[inside]
    found[0, target], found[1, target] = samples.tokens[inside], samples.targets[inside]
    found[2, target] = np.broadcast_to(place, inside.shape)[inside]
    return found.reshape(3, layout.rows, layout.width)


@dataclass(frozen=True)
class Stream:
    """Batches `first` to `end` (exclusive) of the training stream of a seed."""

    task: SyntheticTask
    seed: int
    batch: int
    lengths: tuple[int, int]
    layout: Layout
    first: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<i2" if max(self.task.vocabulary, self.layout.width) < 2**15 else "<i4")

    def __iter__(self) -> Iterator[np.ndarray]:
        """Arrays (batches, planes, rows, width) of at most `CHUNK` batches; one that does not fit is alone."""
        found = []
        for number in range(self.first, self.end):
            samples = self.task.training_batch(number, seed=self.seed, batch=self.batch, lengths=self.lengths)
            one = laid_out(self.task, samples, self.layout, self.dtype)
            fits = one.shape[1:] == (self.layout.rows, self.layout.width)
            if found and (not fits or len(found) == CHUNK):
                yield np.stack(found)
                found = []
            found.append(one)
            if not fits:
                yield np.stack(found)
                found = []
        if found:
            yield np.stack(found)
