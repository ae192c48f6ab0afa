"""Queries and keys -> float32 scores of tiles that can hold weight, and the maxima of every tile and class of keys.

The keys are read once, split over programs, all of them or only listed pages.
"""

import triton
import triton.language as tl

from ..tiles import entmax_parameters, masked_scores, row_ranges
from .rows import locate, tile_range

# A tile is kept if its maximum comes this near to the running maximum minus 1: rounding of tau loses no key.
SLACK = 1e-5


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess", "scaling"])
def scores_kernel(
    q_ptr, k_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, list_ptr, count_ptr, bound_ptr,
    scores_ptr, maxima_ptr, slots_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, tiles, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SLACK: tl.constexpr,
):  # fmt: skip
    group_tile = tl.program_id(0)
    split = tl.program_id(1)
    batch, group, query, head, inside = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=BLOCK_M)
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    columns_of_tile = tl.arange(0, TILE)
    _, _, factor, slope = entmax_parameters(alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES)
    # Vectors also where alpha is one number.
    factor = factor + tl.zeros((BLOCK_M,), tl.float32)
    slope = slope + tl.zeros((BLOCK_M,), tl.float32)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)
    end = tl.where(inside, end, 0)
    low, high = tile_range(start, end, inside, keys, TILE=TILE)

    q_base = q_ptr + batch.to(tl.int64) * stride_qb
    q_rows = head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qn
    q = tl.load(q_base + q_rows[:, None] + dims[None, :], mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + group.to(tl.int64) * stride_kg
    mask_rows = mask_ptr
    if HAS_MASK:
        mask_rows += batch.to(tl.int64) * stride_mb
        mask_rows += (head.to(tl.int64) * stride_mh + query.to(tl.int64) * stride_mn)[:, None]
    scratch = group_tile.to(tl.int64) * tiles
    row_scratch = group_tile.to(tl.int64) * rows + local

    floor = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if HAS_LIST:
        # Listed tiles lie in clusters: neighbours go to different splits.
        first = split
        last = tl.load(count_ptr + group_tile)
        step = splits
        floor = tl.load(bound_ptr + row_scratch, mask=inside, other=float("inf"))
    else:
        share = (high - low + splits - 1) // splits
        first = low + split * share
        last = tl.minimum(first + share, high)
        step = 1
    slots = tl.full((BLOCK_M, TILE), float("-inf"), tl.float32)
    running = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for index in range(first, last, step):
        tile = tl.load(list_ptr + scratch + index) if HAS_LIST else index
        columns = tile * TILE + columns_of_tile
        k_mask = (columns < keys)[:, None]
        if not EVEN_D:
            k_mask = k_mask & (dims < head_dim)[None, :]
        k = tl.load(k_base + columns.to(tl.int64)[:, None] * stride_kn + dims[None, :], mask=k_mask, other=0.0)
        mask_ptrs = mask_rows
        seen = True
        if HAS_MASK:
            mask_ptrs = mask_rows + columns.to(tl.int64)[None, :] * stride_mk
            seen = inside[:, None] & (columns < keys)[None, :]
        x = masked_scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), factor[:, None], slope[:, None], columns[None, :],
            start[:, None], end[:, None], mask_ptrs, seen,
            MASKED=True, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
        )  # fmt: skip
        slots = tl.maximum(slots, x)
        greatest = tl.max(x, 1)
        running = tl.maximum(running, greatest)
        tl.store(maxima_ptr + row_scratch * tiles + tile, greatest, mask=inside)
        # tau is at least the maximum minus 1: the scores of a tile below that are never asked for.
        bound = tl.maximum(running - 1.0 - SLACK * (1.0 + tl.abs(running)), floor)
        kept = inside.to(tl.int32) * tl.max((inside & (greatest > bound)).to(tl.int32), 0)
        score_rows = ((scratch + tile) * rows + local) * TILE
        tl.store(scores_ptr + score_rows[:, None] + columns_of_tile[None, :], x, mask=(kept > 0)[:, None])
    slot_rows = ((group_tile.to(tl.int64) * splits + split) * rows + local) * TILE
    tl.store(slots_ptr + slot_rows[:, None] + columns_of_tile[None, :], slots, mask=inside[:, None])
