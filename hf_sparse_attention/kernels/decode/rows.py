"""Rows of a decoding program: the queries of all heads of one key head, so that a key is read once for all of them;
and the tiles of keys they ask for.

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


@triton.jit
def dealt_tiles(lists, bounds_ptr, row_scratch, inside, level, low, high, split, splits, tiles, SCAN: tl.constexpr):
    """Lists what is a split's of the tiles whose bound is above the level in one of the rows; their number.

    They are dealt out in turn, so that no split has more than one tile more than another.
    """
    scan = tl.arange(0, SCAN)
    count = 0
    for base in range(low, high, SCAN):
        tile = base + scan
        bounds = tl.load(
            bounds_ptr + row_scratch[:, None] * tiles + tile[None, :],
            mask=inside[:, None] & (tile < high)[None, :],
            other=float("-inf"),
        )
        alive = tl.max((bounds > level[:, None]).to(tl.int32), 0)
        turn = count + tl.cumsum(alive, 0) - alive
        tl.store(lists + turn // splits, tile, mask=(alive > 0) & (turn % splits == split))
        count += tl.sum(alive, 0)
    return tl.maximum(count - split + splits - 1, 0) // splits


@triton.jit
def listed_tiles(
    lists, maxima_ptr, row_scratch, inside, origin, level, low, high, split, splits, tiles, SCAN: tl.constexpr
):
    """Lists the tiles of a split whose maximum, less the origin, is above the level in one of the rows; their number.

    Every splits-th tile is a split's, as tiles with weight lie in clusters.
    """
    scan = tl.arange(0, SCAN)
    count = 0
    for base in range(0, tl.cdiv(high - low, splits), SCAN):
        tile = low + split + (base + scan) * splits
        maxima = tl.load(
            maxima_ptr + row_scratch[:, None] * tiles + tile[None, :],
            mask=inside[:, None] & (tile < high)[None, :],
            other=float("-inf"),
        )
        alive = tl.max((maxima - origin[:, None] > level[:, None]).to(tl.int32), 0)
        tl.store(lists + count + tl.cumsum(alive, 0) - alive, tile, mask=alive > 0)
        count += tl.sum(alive, 0)
    return count
