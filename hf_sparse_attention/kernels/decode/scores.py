"""Queries and keys -> float32 scores of tiles that can hold weight, and the maxima of every tile and class of keys.

The keys are read once, split over programs, all of them or only pages whose bound lets them hold weight.
"""

import triton
import triton.language as tl

from ..tiles import GENERAL, entmax_parameters, masked_scores, row_ranges
from .pages import ask_pages
from .rows import dealt_tiles, locate, tile_range
from .threshold import subset_thresholds

# A tile is kept if its maximum comes this near to the running maximum minus 1: rounding of tau loses no key.
SLACK = 1e-5
# From so many tiles of a program on, it first takes a lower bound of tau from the newest keys, and from twice as many
# from the oldest too: that costs the time of a tile, and saves writing the scores of most.
LEAST_TILES = 64
# Bounds that are looked at together. Twice as many took 1.8 us more at 32 K keys, no less at 128 K, and 168 registers
# for 128, also where bounds rest.
AT_ONCE = 4096
# Channels whose products a tensor core adds up: in float32, and in half precision above alpha 2, where tau shows it.
CHUNK_D = 32
HALF_CHUNK_D = 64


@triton.jit
def _key_scores(
    columns, q, q_rows, k_base, mask_rows, start, end, inside, factor, slope, stride_kn, stride_mk, keys, head_dim,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK_D: tl.constexpr,
):  # fmt: skip
    """x of the rows and a tile of keys, -inf where a row does not see the key."""
    # A tensor core cuts off, always towards zero, what a partial sum has no digits for. Where all digits of float32
    # are asked for its sums are short ones, which are added as a processor does, rounded.
    CHUNK: tl.constexpr = min(BLOCK_D, CHUNK_D)
    k_rows = k_base + columns.to(tl.int64)[:, None] * stride_kn
    scaled = tl.zeros((q_rows.shape[0], columns.shape[0]), tl.float32)
    for part in tl.static_range(BLOCK_D // CHUNK):
        dims = part * CHUNK + tl.arange(0, CHUNK)
        k_mask = (columns < keys)[:, None]
        if not EVEN_D:
            k_mask = k_mask & (dims < head_dim)[None, :]
        k = tl.load(k_rows + dims[None, :], mask=k_mask, other=0.0)
        q_part = q
        if CHUNK < BLOCK_D:
            q_part = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
        # Scaled first, as a product that is only added to would go on with that sum.
        scaled += factor[:, None] * tl.dot(q_part, tl.trans(k), input_precision=PRECISION)
    mask_ptrs = mask_rows
    seen = True
    if HAS_MASK:
        mask_ptrs = mask_rows + columns.to(tl.int64)[None, :] * stride_mk
        seen = inside[:, None] & (columns < keys)[None, :]
    return masked_scores(
        scaled, 1.0, slope[:, None], columns[None, :],
        start[:, None], end[:, None], mask_ptrs, seen,
        MASKED=True, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
    )  # fmt: skip


@triton.jit
def _walk(
    first, count, lists, q, q_rows, k_base, maxima_rows, scores_rows, local, floor,
    mask_rows, start, end, inside, factor, slope, stride_kn, stride_mk, keys, rows, head_dim,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SLACK: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Tiles from the first on, or those listed: the maxima of tiles and of classes of keys, and the scores to keep."""
    columns_of_tile = tl.arange(0, TILE)
    slots = tl.full((BLOCK_M, TILE), float("-inf"), tl.float32)
    running = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for index in range(0, count):
        tile = tl.load(lists + index) if LISTED else first + index
        x = _key_scores(
            tile * TILE + columns_of_tile, q, q_rows, k_base, mask_rows, start, end, inside, factor, slope,
            stride_kn, stride_mk, keys, head_dim,
            RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
            BLOCK_D=BLOCK_D, EVEN_D=EVEN_D, PRECISION=PRECISION, CHUNK_D=CHUNK_D,
        )  # fmt: skip
        slots = tl.maximum(slots, x)
        greatest = tl.max(x, 1)
        running = tl.maximum(running, greatest)
        tl.store(maxima_rows + tile, greatest, mask=inside)
        # tau is at least the maximum minus 1: the scores of a tile below that are never asked for.
        bound = tl.maximum(running - 1.0 - SLACK * (1.0 + tl.abs(running)), floor)
        kept = inside.to(tl.int32) * tl.max((inside & (greatest > bound)).to(tl.int32), 0)
        score_rows = scores_rows + (tile.to(tl.int64) * rows + local) * TILE
        tl.store(score_rows[:, None] + columns_of_tile[None, :], x, mask=(kept > 0)[:, None])
    return slots


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess", "scaling"])
def scores_kernel(
    q_ptr, k_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, lower_ptr, upper_ptr, bounds_ptr, state_ptr,
    list_ptr, work_ptr, bound_ptr, scores_ptr, maxima_ptr, slots_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    stride_lb, stride_lg, stride_ln,
    stride_ub, stride_ug, stride_un,
    heads, queries, keys, tiles, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK_D: tl.constexpr,
    SLACK: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    STEPS: tl.constexpr,
    SCAN: tl.constexpr,
    ASKED: tl.constexpr,
    PAGES: tl.constexpr,
    BOUND_PRECISION: tl.constexpr,
    MARGIN: tl.constexpr,
):  # fmt: skip
    group_tile = tl.program_id(0)
    split = tl.program_id(1)
    batch, group, query, head, inside = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=BLOCK_M)
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    columns_of_tile = tl.arange(0, TILE)
    alpha, exponent, factor, slope = entmax_parameters(
        alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
    )
    # Vectors also where alpha is one number.
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    alpha, exponent, factor, slope = alpha + zeros, exponent + zeros, factor + zeros, slope + zeros
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)
    end = tl.where(inside, end, 0)
    low, high = tile_range(start, end, inside, keys, TILE=TILE)

    q_base = q_ptr + batch.to(tl.int64) * stride_qb
    q_rows = (q_base + head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qn)[:, None]
    q = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + group.to(tl.int64) * stride_kg
    mask_rows = mask_ptr
    if HAS_MASK:
        mask_rows += batch.to(tl.int64) * stride_mb
        mask_rows += (head.to(tl.int64) * stride_mh + query.to(tl.int64) * stride_mn)[:, None]
    scratch = group_tile.to(tl.int64) * tiles
    row_scratch = group_tile.to(tl.int64) * rows + local
    part = group_tile.to(tl.int64) * splits + split
    maxima_rows = maxima_ptr + row_scratch * tiles
    scores_rows = scores_ptr + scratch * rows * TILE

    share = tl.cdiv(high - low, splits)
    plain = not HAS_PAGES
    if HAS_PAGES:
        plain = tl.load(state_ptr) > 0
    if plain:
        floor = zeros - float("inf")
        low_key = tl.min(tl.where(end > start, start, keys), 0)
        high_key = tl.max(tl.where(end > start, end, 0), 0)
        for seed in tl.range(0, tl.minimum(share // LEAST_TILES, 2), num_stages=1):
            # The newest keys, then the oldest; they are met again in their own tiles.
            columns = tl.where(seed == 0, tl.maximum(high_key - TILE, 0), low_key) + columns_of_tile
            x = _key_scores(
                columns, q, q_rows, k_base, mask_rows, start, end, inside, factor, slope,
                stride_kn, stride_mk, keys, head_dim,
                RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                BLOCK_D=BLOCK_D, EVEN_D=EVEN_D, PRECISION=PRECISION, CHUNK_D=CHUNK_D,
            )  # fmt: skip
            greatest = tl.max(x, 1)
            empty = greatest == float("-inf")
            origin = tl.where(empty, 0.0, greatest)
            found = subset_thresholds(x - origin[:, None], zeros, exponent, alpha, ALPHA_KIND=ALPHA_KIND, STEPS=STEPS)
            found = origin + found - SLACK * (1.0 + tl.abs(origin))
            floor = tl.maximum(floor, tl.where(empty, float("-inf"), found))
        first = low + split * share
        count = tl.minimum(first + share, high) - first
        slots = _walk(
            first, count, list_ptr, q, q_rows, k_base, maxima_rows, scores_rows, local, floor,
            mask_rows, start, end, inside, factor, slope, stride_kn, stride_mk, keys, rows, head_dim,
            LISTED=False, BLOCK_M=BLOCK_M, TILE=TILE, SLACK=SLACK,
            RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
            BLOCK_D=BLOCK_D, EVEN_D=EVEN_D, PRECISION=PRECISION, CHUNK_D=CHUNK_D,
        )  # fmt: skip
        # What the threshold must not fall below, as less was not kept; the same for all splits.
        tl.store(bound_ptr + row_scratch, floor, mask=inside & (local * 0 + split == 0))
    else:
        floor = tl.load(bound_ptr + row_scratch, mask=inside, other=float("inf"))
        lists = list_ptr + group_tile.to(tl.int64) * (tiles + splits) + split * share
        count = 0
        # Not one condition: without pages there is nothing to compile.
        if HAS_PAGES:
            _, _, _, _, exists = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=ROWS)
            few_scratch = group_tile.to(tl.int64) * rows + tl.arange(0, ROWS)
            few_floor = tl.load(bound_ptr + few_scratch, mask=exists, other=float("inf"))
            count = dealt_tiles(
                lists, bounds_ptr, few_scratch, exists, few_floor, low, high, split, splits, tiles, SCAN=SCAN
            )
            tl.debug_barrier()
            if count > ASKED:
                lower_row = lower_ptr + batch.to(tl.int64) * stride_lb + group.to(tl.int64) * stride_lg
                upper_row = upper_ptr + batch.to(tl.int64) * stride_ub + group.to(tl.int64) * stride_ug
                count = ask_pages(
                    lists, count, floor, maxima_rows, q, end, inside, factor, slope, lower_row, upper_row,
                    stride_ln, stride_un, head_dim,
                    HAS_SLOPES=HAS_SLOPES, TILE=TILE, PAGES=PAGES, BLOCK_D=BLOCK_D, PRECISION=BOUND_PRECISION,
                    MARGIN=MARGIN,
                )  # fmt: skip
                tl.debug_barrier()
        slots = _walk(
            0, count, lists, q, q_rows, k_base, maxima_rows, scores_rows, local, floor,
            mask_rows, start, end, inside, factor, slope, stride_kn, stride_mk, keys, rows, head_dim,
            LISTED=True, BLOCK_M=BLOCK_M, TILE=TILE, SLACK=SLACK,
            RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
            BLOCK_D=BLOCK_D, EVEN_D=EVEN_D, PRECISION=PRECISION, CHUNK_D=CHUNK_D,
        )  # fmt: skip
        if HAS_PAGES:
            tl.store(work_ptr + 2 * part, count)
            tl.store(work_ptr + 2 * part + 1, share)
    slot_rows = (part * rows + local) * TILE
    tl.store(slots_ptr + slot_rows[:, None] + columns_of_tile[None, :], slots, mask=inside[:, None])


def chunk_of(call):
    """How many channels a product adds up."""
    precision = call.constants["PRECISION"]
    if precision == "tf32x3":
        return CHUNK_D
    # An alpha per head may be above 2. Up to 128 channels what is cut off stays below what is rounded anyway.
    sharp = call.alpha_kind == GENERAL and (call.alpha_tensor is not None or call.excess > 1)
    return HALF_CHUNK_D if precision != "ieee" and sharp and call.block_dim > 128 else call.block_dim
