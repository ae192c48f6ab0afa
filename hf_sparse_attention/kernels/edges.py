"""Listed tiles -> scores that are masked only where some row's range cuts the tile, in one loop that always turns.

A mask costs two instructions a score; most tiles are seen whole. A branch inside the loop keeps one loop: with two,
or with one that may not turn at all, ptxas waits for every product by itself (C7515).
"""

import triton
import triton.language as tl

from .tiles import key_scores, listed_start


@triton.jit
def seen_by_all(start, end, keys):
    """From which key to which every row sees every key; rows that see nothing do not count."""
    some = start < end
    return tl.max(tl.where(some, start, 0), 0), tl.min(tl.where(some, end, keys), 0)


@triton.jit
def sees(columns, start, end, RANGE_KIND: tl.constexpr):
    """Whether rows that see the keys from start to end see these columns; all three broadcast."""
    if RANGE_KIND == 2:
        # One unsigned comparison for start <= column < end: two are packed bit by bit into registers (NOTES.md).
        return (columns - start).to(tl.uint32) < tl.maximum(end - start, 0).to(tl.uint32)
    else:
        return columns < end


@triton.jit
def turns(pieces):
    """How often a loop over the pieces turns: at least once, so that products and zeros do not meet behind it."""
    return tl.maximum(pieces, 1)


@triton.jit
def turn_start(lists, index, pieces, key_tiles, TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """First position of the index-th piece; behind the last key, where there is nothing, if the list is empty."""
    return tl.where(pieces > 0, listed_start(lists, index, TILE=TILE, BLOCK_N=BLOCK_N), key_tiles * TILE)


@triton.jit
def lane_sums(x):
    """(M, N) -> (M, 4), sums over the columns of a row that tensor cores give to one thread: without shuffles."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2))
    return tl.sum(tl.sum(x, 1), 2)


@triton.jit
def edge_scores(
    q, k, first, rows, queries, keys, start, end, seen_start, seen_end, factor, slope, mask_base, stride_mn, stride_mk,
    BLOCK_N: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """x of a block of queries and the keys from first on, -inf where the query does not see the key.

    FUSED multiplies with the factor last, so that one instruction does it and subtracts tau; other last bits.
    """
    LATE: tl.constexpr = FUSED and not HAS_SLOPES
    x = key_scores(
        q, k, first, rows, queries, keys, start, end, 1.0 if LATE else factor, slope, mask_base, stride_mn, stride_mk,
        BLOCK_N=BLOCK_N, MASKED=False, RANGE_KIND=RANGE_KIND,
        HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
    )  # fmt: skip
    if (first < seen_start) | (first + BLOCK_N > seen_end):
        columns = (first + tl.arange(0, BLOCK_N))[None, :]
        x = tl.where(sees(columns, start[:, None], end[:, None], RANGE_KIND=RANGE_KIND), x, float("-inf"))
    if LATE:
        x *= factor
    return x
