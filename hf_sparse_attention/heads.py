"""Some of the heads of q, k and v as tensors of their own, and two parts put together again: what a layer needs that
is sparse in some of its heads only. Slices, no index tensors: nothing travels to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Shapes: B batch, H heads, G key heads, K keys, D head size.


def take_heads(tensor: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """tensor (B, H, ...) -> (B, len(heads), ...), in the order given; a view where the heads follow each other."""
    parts = [tensor[:, first:end] for first, end in _runs(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def take_key_heads(tensor_BGKD: torch.Tensor, heads: Sequence[int], group: int) -> torch.Tensor:
    """The key heads that serve some query heads, `group` query heads to a key head.

    Whole groups keep sharing their key head; else each query head gets its key head as its own.
    """
    served = [head // group for head in heads]
    whole = sorted(set(served))
    if list(heads) == [head * group + member for head in whole for member in range(group)]:
        served = whole
    return take_heads(tensor_BGKD, served)


def merge_heads(part: torch.Tensor, rest: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """part (B, len(heads), ...) at the places `heads` (rising), rest (B, others, ...) at the others, in order."""
    pieces, taken, left = [], 0, 0
    for first, end in _runs(heads):
        before = first - taken - left
        pieces += [rest[:, left : left + before], part[:, taken : taken + end - first]]
        left, taken = left + before, taken + end - first
    pieces.append(rest[:, left:])
    return torch.cat([piece for piece in pieces if piece.shape[1]], dim=1)


def other_heads(heads: Sequence[int], count: int) -> tuple[int, ...]:
    """The heads of 0 ... count - 1 that are not among `heads`."""
    return tuple(head for head in range(count) if head not in heads)


def _runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges of heads that follow each other."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0], head + 1)
        else:
            runs.append((head, head + 1))
    return runs
