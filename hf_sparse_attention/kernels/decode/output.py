"""Stored scores, tau and values -> output of the rows with more keys than a program of `threshold.py` takes. Only the
values of keys with weight are read, many of them at once; the parts of the splits are added in a fixed order."""

import triton
import triton.language as tl

from ..tiles import entmax_parameters, row_ranges, weights
from .rows import listed_tiles, locate, tile_range

# Scores of one row tile that are looked at together, and numbers of parts that are added at once.
AT_ONCE = 4096
# Tiles whose maxima are scanned at once.
SCAN = 512


@triton.jit
def add_values(
    v_base, out_row, key_list, count, scores, origin, tau, exponent, stride_wn, rows, head_dim,
    ALPHA_KIND: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The output of one row from its listed keys, whose scores are at `scores`."""
    dims = tl.arange(0, BLOCK_D)
    scan = tl.arange(0, KEYS)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    for base in range(0, count, KEYS):
        known = base + scan < count
        column = tl.load(key_list + base + scan, mask=known, other=0)
        place = (column // TILE).to(tl.int64) * rows * TILE + column % TILE
        x = tl.load(scores + place, mask=known, other=float("-inf"))
        p, u = weights(x - origin, tau, exponent, ALPHA_KIND=ALPHA_KIND)
        v = tl.load(
            v_base + column.to(tl.int64)[:, None] * stride_wn + dims[None, :],
            mask=(p > 0)[:, None] & (dims < head_dim)[None, :],
            other=0.0,
        )
        acc += tl.sum(p[:, None] * v.to(tl.float32), 0)
        total += tl.sum(p, 0)
    tl.store(out_row + dims, normalized(acc, total).to(out_row.dtype.element_ty), mask=dims < head_dim)


@triton.jit
def normalized(acc, total):
    """The weights sum to one but for the last digits of tau and of the power; a row that sees no key has none."""
    return acc / tl.where(total > 0, total, 1.0)


@triton.jit
def _add_parts(
    parts_ptr, counts_ptr, sums_ptr, pending_ptr, out_ptr, group_tile, stride_ob, stride_oh, stride_on,
    heads, queries, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of all splits in order -> the output, by the last program of a row tile to arrive."""
    batch, group, query, head, inside = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=ROWS)
    local = tl.arange(0, ROWS)
    row_scratch = group_tile.to(tl.int64) * rows + local
    inside = inside & (tl.load(pending_ptr + row_scratch, mask=inside, other=0) > 0)
    dims = tl.arange(0, BLOCK_D)
    parts = tl.arange(0, PARTS)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = group_tile.to(tl.int64) * splits
    for base in range(0, splits, PARTS):
        split = base + parts
        filled = tl.load(counts_ptr + first + split, mask=split < splits, other=0, cache_modifier=".cg") > 0
        # From the first part of the row tile on, 32 bits are enough.
        part_rows = split[:, None] * rows + local[None, :]
        known = filled[:, None] & inside[None, :]
        row_sums = tl.load(sums_ptr + first * rows + part_rows, mask=known, other=0.0, cache_modifier=".cg")
        total += tl.sum(row_sums, 0)
        acc += tl.sum(
            tl.load(
                parts_ptr + first * rows * head_dim + (part_rows[:, :, None] * head_dim + dims[None, None, :]),
                mask=known[:, :, None] & (dims < head_dim)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            ),
            0,
        )
    acc = normalized(acc, total[:, None])
    place = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + query.to(tl.int64) * stride_on
    tl.store(
        out_ptr + place[:, None] + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < head_dim)[None, :],
    )


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess"])
def output_kernel(
    v_ptr, alpha_ptr, visible_ptr, scores_ptr, maxima_ptr, origin_ptr, level_ptr, pending_ptr, list_ptr, key_list_ptr,
    parts_ptr, counts_ptr, sums_ptr, arrived_ptr, out_ptr,
    excess,
    stride_wb, stride_wg, stride_wn,
    stride_vb, stride_vn,
    stride_ob, stride_oh, stride_on,
    heads, queries, keys, tiles, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    group_tile = tl.program_id(0)
    split = tl.program_id(1)
    scratch = group_tile.to(tl.int64) * tiles
    # The rows that exist, without those that only fill a product up.
    batch, group, query, head, inside = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=ROWS)
    local = tl.arange(0, ROWS)
    row_scratch = group_tile.to(tl.int64) * rows + local
    inside = inside & (tl.load(pending_ptr + row_scratch, mask=inside, other=0) > 0)
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    _, exponent, _, _ = entmax_parameters(alpha_ptr, excess, alpha_ptr, 1.0, head, HAS_ALPHA, False)
    exponent = exponent + tl.zeros((ROWS,), tl.float32)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)
    low, high = tile_range(start, end, inside, keys, TILE=TILE)
    origin = tl.load(origin_ptr + row_scratch, mask=inside, other=0.0)
    tau = tl.load(level_ptr + row_scratch, mask=inside, other=float("inf"))
    part = group_tile.to(tl.int64) * splits + split
    lists = list_ptr + group_tile.to(tl.int64) * (tiles + splits) + split * tl.cdiv(high - low, splits)
    count = listed_tiles(
        lists, maxima_ptr, row_scratch, inside, origin, tau, low, high, split, splits, tiles, SCAN=SCAN
    )
    tl.debug_barrier()

    # The keys with weight, of many tiles at once: what follows reads their values together.
    key_list = key_list_ptr + (group_tile.to(tl.int64) * (tiles + splits) + split * tl.cdiv(high - low, splits)) * TILE
    entries = tl.arange(0, TILES * TILE)
    key_count = 0
    sums = tl.zeros((ROWS,), tl.float32)
    for base in range(0, count, TILES):
        listed = base + entries // TILE
        tile = tl.load(lists + listed, mask=listed < count, other=0)
        place = ((scratch + tile)[None, :] * rows + local[:, None]) * TILE + (entries % TILE)[None, :]
        x = tl.load(scores_ptr + place, mask=inside[:, None] & (listed < count)[None, :], other=float("-inf"))
        p, u = weights(x - origin[:, None], tau[:, None], exponent[:, None], ALPHA_KIND=ALPHA_KIND)
        sums += tl.sum(p, 1)
        weighs = (tl.max(p, 0) > 0).to(tl.int32)
        place = key_count + tl.cumsum(weighs, 0) - weighs
        tl.store(key_list + place, tile * TILE + entries % TILE, mask=weighs > 0)
        key_count += tl.sum(weighs, 0)
    tl.store(sums_ptr + part * rows + local, sums, mask=inside)
    tl.debug_barrier()

    batch, group, query, head, inside = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=BLOCK_M)
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    columns_of_tile = tl.arange(0, TILE)
    row_scratch = group_tile.to(tl.int64) * rows + local
    inside = inside & (tl.load(pending_ptr + row_scratch, mask=inside, other=0) > 0)
    _, exponent, _, _ = entmax_parameters(alpha_ptr, excess, alpha_ptr, 1.0, head, HAS_ALPHA, False)
    exponent = exponent + tl.zeros((BLOCK_M,), tl.float32)
    origin = tl.load(origin_ptr + row_scratch, mask=inside, other=0.0)
    tau = tl.load(level_ptr + row_scratch, mask=inside, other=float("inf"))
    v_base = v_ptr + batch.to(tl.int64) * stride_wb + group.to(tl.int64) * stride_wg
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for base in range(0, key_count, TILE):
        known = base + columns_of_tile < key_count
        column = tl.load(key_list + base + columns_of_tile, mask=known, other=0)
        place = ((scratch + column // TILE)[None, :] * rows + local[:, None]) * TILE + (column % TILE)[None, :]
        x = tl.load(scores_ptr + place, mask=inside[:, None] & known[None, :], other=float("-inf"))
        p, u = weights(x - origin[:, None], tau[:, None], exponent[:, None], ALPHA_KIND=ALPHA_KIND)
        v_mask = known[:, None]
        if not EVEN_D:
            v_mask = v_mask & (dims < head_dim)[None, :]
        v = tl.load(v_base + column.to(tl.int64)[:, None] * stride_wn + dims[None, :], mask=v_mask, other=0.0)
        rounded = p.to(v.dtype)
        acc = tl.dot(rounded, v, acc, input_precision=PRECISION)
        if v.dtype != tl.float32:
            # What rounding took from the weights is added, so the output is rounded once.
            acc = tl.dot((p - rounded.to(tl.float32)).to(v.dtype), v, acc, input_precision=PRECISION)
    tl.store(counts_ptr + part, key_count)
    if key_count > 0:
        part_rows = (part * rows + local) * head_dim
        tl.store(
            parts_ptr + part_rows[:, None] + dims[None, :], acc, mask=inside[:, None] & (dims < head_dim)[None, :]
        )
    # What the threads of this program wrote is seen by whoever sees that it has arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + group_tile, 1) == splits - 1:
        _add_parts(
            parts_ptr, counts_ptr, sums_ptr, pending_ptr, out_ptr, group_tile, stride_ob, stride_oh, stride_on,
            heads, queries, splits, row_tiles, rows, head_dim,
            GROUP=GROUP, ROWS=ROWS, BLOCK_D=BLOCK_D, PARTS=PARTS,
        )  # fmt: skip
