"""Blocks that grow while a model is trained: `1024:0.8,4096:0.2` -> the block size and batch size of every step, with
as many tokens in each. A leaf."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Steps from `first` on have `batch_size` blocks of `block_size` tokens in a forward pass of one process."""

    first: int
    block_size: int
    batch_size: int


def parse_block_sizes(text: str | int) -> list[tuple[int, float]]:
    """`1024` or `1024:0.8,4096:0.2` -> [(block size, share of the steps)].

    Raises:
        ValueError: if it is neither, sizes do not grow, or the shares do not add up to 1.
    """
    parts = [part.strip() for part in str(text).split(",") if part.strip()]
    try:
        if len(parts) == 1 and ":" not in parts[0]:
            sizes = [(int(parts[0]), 1.0)]
        else:
            sizes = [(int(size), float(share)) for size, share in (part.split(":") for part in parts)]
    except ValueError:
        sizes = []
    if not sizes:
        raise ValueError(
            f"block_size is {text!r}; it is a number, or sizes with their share of the steps: 1024:0.8,4096:0.2"
        )
    if any(size < 2 for size, _ in sizes):
        raise ValueError(f"block_size is {text!r}; a block has at least 2 tokens")
    if any(first[0] >= second[0] for first, second in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"block_size is {text!r}; sizes must grow")
    if any(not share > 0 for _, share in sizes) or abs(sum(share for _, share in sizes) - 1) > 1e-6:
        raise ValueError(f"block_size is {text!r}; the shares must be above 0 and add up to 1")
    return sizes


def phases_of(sizes: list[tuple[int, float]], steps: int, batch_size: int) -> list[Phase]:
    """The phases of a run; `batch_size` is that of the first, later ones have as many tokens in fewer blocks.

    Raises:
        ValueError: if a later block size does not divide the tokens of a forward pass, or a phase has no step.
    """
    tokens = sizes[0][0] * batch_size
    phases, share_before = [], 0.0
    for size, share in sizes:
        if tokens % size:
            raise ValueError(
                f"block_size {size} does not divide the {tokens} tokens of a forward pass (batch_size {batch_size} of "
                f"{sizes[0][0]}): make batch_size a multiple of {size // math.gcd(size, sizes[0][0])}"
            )
        phases.append(Phase(round(share_before * steps), size, tokens // size))
        share_before += share
    ends = [*(phase.first for phase in phases[1:]), steps]
    if any(phase.first >= end for phase, end in zip(phases, ends, strict=True)):
        raise ValueError(f"block_size has a phase without a step among {steps} steps: give it a larger share")
    return phases


def phase_at(phases: list[Phase], step: int) -> int:
    """Number of the phase of a step."""
    return max(index for index, phase in enumerate(phases) if phase.first <= step)
