"""What every tile of queries listed or took apart -> the same by tile of keys, as the key gradient walks it.

A program per tile of keys sums over the map in fixed order: no atomics, no sort, the same order every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .compiling import Kernel
from .strays import APART


@dataclass(frozen=True)
class ByKeys:
    """The tiles of queries of every tile of keys, and the strays by tile of keys with their p and ds.

    tiles (B, H, K/TILE, N/TILE) int16: ascending; where the map tells cut ones apart those descend from the row's end.
    counts (B, H, K/TILE, 1 or 2) int32: how many stand at the head and, if told apart, at the end.
    The rest is None without strays. starts (B, H, K/TILE, N/TILE) int32, where the map says APART: where those of a
    tile go, less their place of origin, counted from the start of their tile of keys; ends and totals of those
    (B * G * K/TILE). codes (B * H * N * room) int32: TILE times the query within the group of heads plus the key
    within the tile; weights (2, B * H * N * room): p and ds. The query gradient writes both.
    """

    tiles: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    totals: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@Kernel
@triton.jit(do_not_specialize=["query_tiles", "key_tiles"])
def _transpose_kernel(
    map_ptr, stray_map_ptr, list_ptr, count_ptr, start_ptr, total_ptr, query_tiles, key_tiles,
    MEMBERS: tl.constexpr,
    SCAN: tl.constexpr,
    SPLIT: tl.constexpr,
    STRAYS: tl.constexpr,
):  # fmt: skip
    """MEMBERS heads of one tile of keys: their rows of the map -> lists, and where their strays go."""
    program = tl.program_id(0)
    scan = tl.arange(0, SCAN)
    total = 0
    for member in range(0, MEMBERS):
        row = (program // key_tiles * MEMBERS + member).to(tl.int64) * key_tiles + program % key_tiles
        cells = row * query_tiles
        count = 0
        cut_count = 0
        for base in range(0, query_tiles, SCAN):
            tiles = base + scan
            flags = tl.load(map_ptr + cells + tiles, mask=tiles < query_tiles, other=0).to(tl.int32)
            # Most of a row is empty where documents are short.
            if tl.max(flags, 0) > 0:
                chosen = (flags == (2 if SPLIT else 1)).to(tl.int32)
                place = count + tl.cumsum(chosen, 0) - chosen
                tl.store(list_ptr + cells + place, tiles.to(tl.int16), mask=chosen > 0)
                count += tl.sum(chosen, 0)
                if SPLIT:
                    cut = (flags == 1).to(tl.int32)
                    place = query_tiles - 1 - (cut_count + tl.cumsum(cut, 0) - cut)
                    tl.store(list_ptr + cells + place, tiles.to(tl.int16), mask=cut > 0)
                    cut_count += tl.sum(cut, 0)
                if STRAYS:
                    apart = flags == APART
                    codes = tl.load(stray_map_ptr + cells + tiles, mask=apart, other=0)
                    sizes = codes & 255
                    begin = total + tl.cumsum(sizes, 0) - sizes
                    tl.store(start_ptr + cells + tiles, begin - (codes >> 8), mask=apart)
                    total += tl.sum(sizes, 0)
        if SPLIT:
            tl.store(count_ptr + row * 2, count)
            tl.store(count_ptr + row * 2 + 1, cut_count)
        else:
            tl.store(count_ptr + row, count)
    if STRAYS:
        tl.store(total_ptr + program, total)


def transpose(call, lists, strays):
    """`ByKeys`: lists by tile of keys, places for the strays and room for what the query gradient puts there."""
    batch, heads, key_tiles, query_tiles = lists.tile_map.shape
    device = lists.tile_map.device
    # For visible ranges the map tells the tiles that every query sees whole from those that need a mask.
    split = call.visible is not None
    tiles = torch.empty(lists.tile_map.shape, dtype=torch.int16, device=device)
    counts = torch.empty((batch, heads, key_tiles, 1 + split), dtype=torch.int32, device=device)
    stray_map = starts = totals = None
    members = 1
    if strays is not None:
        # The strays of a group of heads go to the same keys.
        members = call.group
        stray_map = strays.tile_map
        starts = torch.empty_like(stray_map)
        totals = torch.empty(batch * heads // members * key_tiles, dtype=torch.int32, device=device)
    _transpose_kernel[(batch * heads // members * key_tiles,)](
        lists.tile_map, stray_map, tiles, counts, starts, totals, query_tiles, key_tiles,
        MEMBERS=members,
        SCAN=512 if split else 128,
        SPLIT=split,
        STRAYS=strays is not None,
        num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    if strays is None:
        return ByKeys(tiles, counts)
    size = strays.pool.numel() // 2
    codes = torch.empty(size, dtype=torch.int32, device=device)
    weights = torch.empty((2, size), dtype=call.query.dtype, device=device)
    return ByKeys(tiles, counts, starts, totals.cumsum(0), totals, codes, weights)
