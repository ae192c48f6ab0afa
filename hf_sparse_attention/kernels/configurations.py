"""Launch parameters per card family: no autotuning happens on the user's time.

Enters: head dimension, element size, device. Leaves: a `Configuration` with tile sizes, warps and pipeline depths.
`measured` names the card the row was tuned on, or is empty for a safe default.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

# Rows and columns of the tiles the lists speak of: what can be skipped is skipped in this unit.
TILE = 64


@dataclass(frozen=True)
class Launch:
    """Warps per program, depth of the software pipeline, and the most registers a thread may take (0: no limit)."""

    warps: int
    stages: int
    registers: int = 0

    def limit(self):
        """The keyword that limits the registers, where there is a limit."""
        return {"maxnreg": self.registers} if self.registers else {}


@dataclass(frozen=True)
class Configuration:
    """How the kernels are launched for a head dimension on a card family; `pairs` walk 2 * TILE queries together."""

    threshold_rows: int
    threshold_columns: int
    threshold: Launch
    threshold_programs: int
    refine: Launch
    refine_pairs: Launch
    forward: Launch
    forward_pairs: Launch
    query_gradient: Launch
    query_gradient_pairs: Launch
    key_gradient: Launch
    # Tiles of TILE queries with at most so many pairs above the bound are taken apart; 0: every listed tile is walked.
    stray_limit: int = 0
    # Pairs per query that are kept for a backward, a power of two. Without one they lie where the output will.
    stray_room: int = 16
    # Depth of the pipeline of gathered rows.
    stray_stages: int = 1
    collect: Launch = Launch(4, 2, 128)
    collect_pairs: Launch = Launch(8, 2, 128)
    # Programs of TILE queries that run on a multiprocessor.
    collect_programs: int = 4
    # Columns of a listed tile taken at once, a divisor of TILE.
    inner: int = TILE
    measured: str = ""


def _default(element_size, block_dim):
    wide = block_dim * element_size >= 512
    warps = 8 if block_dim > 128 else 4
    stages = 1 if wide else 2
    return Configuration(
        threshold_rows=64 if wide else 128,
        threshold_columns=64,
        threshold=Launch(4 if wide else 8, stages),
        threshold_programs=2,
        refine=Launch(warps, stages),
        refine_pairs=Launch(8, stages),
        forward=Launch(warps, stages),
        forward_pairs=Launch(8, stages),
        query_gradient=Launch(warps, stages),
        query_gradient_pairs=Launch(8, stages),
        key_gradient=Launch(warps, 1),
        collect=Launch(warps, stages),
        collect_pairs=Launch(8, stages),
        inner=32 if block_dim * element_size > 512 else TILE,
    )


_HOPPER = Configuration(
    threshold_rows=128,
    threshold_columns=128,
    threshold=Launch(8, 2, 128),
    threshold_programs=2,
    refine=Launch(4, 2),
    refine_pairs=Launch(8, 2),
    forward=Launch(4, 3),
    forward_pairs=Launch(8, 3),
    query_gradient=Launch(4, 3),
    query_gradient_pairs=Launch(8, 3),
    key_gradient=Launch(4, 2),
    measured="NVIDIA H200",
)

# (compute capability major, element size, padded head dimension) -> Configuration
# 64 was timed with the row tuned for 128.
MEASURED = {(9, 2, 128): _HOPPER, (9, 2, 64): _HOPPER}


# What `configured` has changed; of all threads, as the backward runs in one of its own.
_changes: dict = {}


@cache
def _capability(device_index):
    return torch.cuda.get_device_capability(device_index)[0]


@cache
def processors(device_index):
    """Number of multiprocessors of the card (1 under the interpreter)."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def configuration(device, element_size, block_dim):
    """The row of the table for this device, or the default, with the fields changed by `configured`."""
    return replace(_row(device, element_size, block_dim), **_changes)


@contextmanager
def configured(**changes):
    """Fields of every `Configuration` have other values inside, to measure them: configured(stray_limit=64)."""
    unknown = sorted(changes.keys() - Configuration.__dataclass_fields__.keys())
    if unknown:
        names = ", ".join(Configuration.__dataclass_fields__)
        raise ValueError(f"a configuration has no field {', '.join(unknown)}; its fields are {names}")
    before = dict(_changes)
    _changes.update(changes)
    try:
        yield
    finally:
        _changes.clear()
        _changes.update(before)


def _row(device, element_size, block_dim):
    if device.type == "cuda" and torch.version.hip is None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        found = MEASURED.get((_capability(index), element_size, block_dim))
        if found is not None:
            return found
    return _default(element_size, block_dim)
