"""Rows of a decoding program: the queries of all heads of one key head, so that a key is read once for all of them.

Legend: M rows of a row tile, numbered query by query; a group tile is one row tile of one key head of one sequence.
"""

import triton
import triton.language as tl


@triton.jit
def locate(group_tile, row_tiles, heads, queries, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Batch, key head, and of every row its query, its head and whether it exists."""
    key_heads = heads // GROUP
    batch = group_tile // (key_heads * row_tiles)
    group = group_tile // row_tiles % key_heads
    index = group_tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < queries * GROUP
    index = tl.minimum(index, queries * GROUP - 1)
    return batch, group, index // GROUP, group * GROUP + index % GROUP, inside


@triton.jit
def tile_range(start, end, inside, keys, TILE: tl.constexpr):
    """First and one past the last tile that one of the rows sees."""
    seeing = inside & (end > start)
    high = (tl.max(tl.where(seeing, end, 0), 0) + TILE - 1) // TILE
    low = tl.min(tl.where(seeing, start, keys), 0) // TILE
    return tl.minimum(low, high), high
