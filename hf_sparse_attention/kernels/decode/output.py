"""Stored scores, tau and values -> output. Only the values of keys with weight are read; the parts of the splits over
the keys are added in a fixed order."""

import triton
import triton.language as tl

from ..tiles import entmax_parameters, row_ranges, weights
from .rows import locate, tile_range

# Tiles scanned at once, and parts added at once.
SCAN = 32
PARTS = 16


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess"])
def output_kernel(
    v_ptr, alpha_ptr, visible_ptr, scores_ptr, maxima_ptr, origin_ptr, level_ptr, list_ptr, parts_ptr, counts_ptr,
    excess,
    stride_wb, stride_wg, stride_wn,
    stride_vb, stride_vn,
    heads, queries, keys, tiles, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    group_tile = tl.program_id(0)
    split = tl.program_id(1)
    batch, group, query, head, inside = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=BLOCK_M)
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    columns_of_tile = tl.arange(0, TILE)
    _, exponent, _, _ = entmax_parameters(alpha_ptr, excess, alpha_ptr, 1.0, head, HAS_ALPHA, False)
    exponent = exponent + tl.zeros((BLOCK_M,), tl.float32)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)
    low, high = tile_range(start, end, inside, keys, TILE=TILE)
    scratch = group_tile.to(tl.int64) * tiles
    row_scratch = group_tile.to(tl.int64) * rows + local
    origin = tl.load(origin_ptr + row_scratch, mask=inside, other=0.0)
    tau = tl.load(level_ptr + row_scratch, mask=inside, other=float("inf"))

    # Every splits-th tile is this program's, as tiles with weight lie in clusters; those with weight are listed.
    share = (high - low + splits - 1) // splits
    lists = list_ptr + group_tile.to(tl.int64) * (tiles + splits) + split * share
    scan = tl.arange(0, SCAN)
    count = 0
    for base in range(0, share, SCAN):
        tile = low + split + (base + scan) * splits
        mine = (base + scan < share) & (tile < high)
        maxima = tl.load(
            maxima_ptr + row_scratch[:, None] * tiles + tile[None, :],
            mask=inside[:, None] & mine[None, :],
            other=float("-inf"),
        )
        alive = tl.max((maxima - origin[:, None] > tau[:, None]).to(tl.int32), 0)
        tl.store(lists + count + tl.cumsum(alive, 0) - alive, tile, mask=alive > 0)
        count += tl.sum(alive, 0)
    tl.debug_barrier()

    v_base = v_ptr + batch.to(tl.int64) * stride_wb + group.to(tl.int64) * stride_wg
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for index in range(0, count):
        tile = tl.load(lists + index)
        columns = tile * TILE + columns_of_tile
        score_rows = ((scratch + tile) * rows + local) * TILE
        x = tl.load(
            scores_ptr + score_rows[:, None] + columns_of_tile[None, :], mask=inside[:, None], other=float("-inf")
        )
        p, u = weights(x - origin[:, None], tau[:, None], exponent[:, None], ALPHA_KIND=ALPHA_KIND)
        # Only keys with weight are read; the rest of the tile costs no traffic.
        v_mask = ((tl.max(p, 0) > 0) & (columns < keys))[:, None]
        if not EVEN_D:
            v_mask = v_mask & (dims < head_dim)[None, :]
        v = tl.load(v_base + columns.to(tl.int64)[:, None] * stride_wn + dims[None, :], mask=v_mask, other=0.0)
        rounded = p.to(v.dtype)
        acc = tl.dot(rounded, v, acc, input_precision=PRECISION)
        if v.dtype != tl.float32:
            # What rounding took from the weights is added, so the output is rounded once.
            acc = tl.dot((p - rounded.to(tl.float32)).to(v.dtype), v, acc, input_precision=PRECISION)
    part = group_tile.to(tl.int64) * splits + split
    tl.store(counts_ptr + part, count)
    if count > 0:
        part_rows = (part * rows + local) * head_dim
        tl.store(
            parts_ptr + part_rows[:, None] + dims[None, :], acc, mask=inside[:, None] & (dims < head_dim)[None, :]
        )


@triton.jit(do_not_specialize=["queries", "splits", "row_tiles", "rows"])
def sum_kernel(
    parts_ptr, counts_ptr, out_ptr,
    stride_ob, stride_oh, stride_on,
    heads, queries, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group_tile = row // rows
    key_heads = heads // GROUP
    index = group_tile % row_tiles * BLOCK_M + row % rows
    if index >= queries * GROUP:
        return
    batch = group_tile // (key_heads * row_tiles)
    head = group_tile // row_tiles % key_heads * GROUP + index % GROUP
    dims = tl.arange(0, BLOCK_D)
    parts = tl.arange(0, PARTS)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for base in range(0, splits, PARTS):
        split = base + parts
        part = group_tile.to(tl.int64) * splits + split
        filled = tl.load(counts_ptr + part, mask=split < splits, other=0) > 0
        acc += tl.sum(
            tl.load(
                parts_ptr + (part * rows + row % rows)[:, None] * head_dim + dims[None, :],
                mask=filled[:, None] & (dims < head_dim)[None, :],
                other=0.0,
            ),
            0,
        )
    place = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    place += (index // GROUP).to(tl.int64) * stride_on
    tl.store(out_ptr + place + dims, acc.to(out_ptr.dtype.element_ty), mask=dims < head_dim)
