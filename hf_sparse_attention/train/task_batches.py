"""Batches made ahead of their use by other processes, so that neither the device nor another run waits for them. Which
process makes a batch changes nothing in it: it is a function of its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..tasks.samples import Samples

# Batches that travel together: one message for each would take as long as making some of them.
_TOGETHER = 16


def made_ahead(make: Callable[[int], Samples], numbers: range, *, workers: int) -> Iterator[Samples]:
    """`make(number)` of every number in order: made by so many other processes, or for 0 here when it is asked for."""
    if not workers:
        yield from map(make, numbers)
        return
    loader = DataLoader(
        _Made(make, numbers),
        batch_size=None,
        sampler=range(0, len(numbers), _TOGETHER),
        num_workers=workers,
        collate_fn=_as_it_is,
    )
    for part in loader:
        yield from (Samples(*(array.astype(np.int64) for array in arrays)) for arrays in part)


class _Made(Dataset):
    """Batches from some number on, as arrays of 32 bits, which is half to send."""

    def __init__(self, make: Callable[[int], Samples], numbers: range):
        self.make, self.numbers = make, numbers

    def __getitem__(self, first: int) -> list[list[np.ndarray]]:
        made = (self.make(number) for number in self.numbers[first : first + _TOGETHER])
        return [[array.astype(np.int32) for array in astuple(samples)] for samples in made]


def _as_it_is(part):
    """Arrays stay arrays: tensors would be sent through shared memory, which containers have little of."""
    return part
