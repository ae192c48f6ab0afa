"""A few queries against a long cache -> output and tau: scores once, tau from the stored scores, few values read.

Four passes, split over the keys: `_scores_kernel` reads K once and keeps the float32 scores of tiles that can hold
weight and every tile's maxima; `_threshold_kernel` solves for tau; `_output_kernel` reads the values of keys with weight;
`_sum_kernel` adds the splits' parts in a fixed order. Legend: M rows (queries of all heads of one key head).
"""

import torch
import triton
import triton.language as tl

from .configurations import TILE, processors
from .forward import last_step
from .refine import refine
from .tiles import entmax_parameters, masked_scores, row_ranges, weights

# Queries of one sequence that count as decoding: more are a prefill.
MOST_QUERIES = 16
# Rows of one program: the queries of all heads of a key head, so that a key is read once for all of them.
MOST_ROWS = 64
MOST_SPLITS = 128
PROGRAMS_PER_PROCESSOR = 4
STEPS = 5
# Tiles whose maxima are scanned at once, and listed tiles whose scores are held in registers.
SCAN = 1024
LISTED = 32
# Tiles scanned at once for the output, and parts added at once.
OUTPUT_SCAN = 32
PARTS = 16
# A tile is kept if its maximum comes this near to the running maximum minus 1: rounding of tau loses no key.
SLACK = 1e-5


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
def subset_threshold(x, greatest, exponent, alpha, ALPHA_KIND: tl.constexpr, STEPS: tl.constexpr):
    """A lower bound of tau from some of the row's keys, (A, B): Newton from the left, for alpha <= 2 never past tau."""
    tau = greatest - 1.0
    if alpha <= 2.0:
        for _ in range(STEPS):
            p, u = weights(x, tau, exponent, ALPHA_KIND=ALPHA_KIND)
            total = tl.sum(tl.sum(p, 1), 0)
            slope = tl.sum(tl.sum(u, 1), 0)
            if ALPHA_KIND == 15:
                norm_power = tl.sqrt(total)
            elif ALPHA_KIND == 20:
                norm_power = 1.0
            else:
                norm_power = tl.exp2(tl.log2(tl.maximum(total, 1.0)) * (1.0 - 1.0 / exponent))
            tau += tl.maximum((total - norm_power) / tl.maximum(slope, 1e-30), 0.0)
    # Rounding of the steps must not lift the bound above tau.
    return tau - (1e-6 * tl.abs(tau) + 1e-6)


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess", "scaling"])
def _scores_kernel(
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
    q = tl.load(
        q_base + q_rows[:, None] + dims[None, :], mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0
    )
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


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess"])
def _threshold_kernel(
    alpha_ptr, visible_ptr, bound_ptr, scores_ptr, maxima_ptr, slots_ptr, list_ptr, origin_ptr, level_ptr, tau_ptr,
    excess,
    stride_vb, stride_vn,
    heads, queries, keys, tiles, splits, row_tiles, rows,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SCAN: tl.constexpr,
    LISTED: tl.constexpr,
    STEPS: tl.constexpr,
    TOLERANCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group_tile = row // rows
    key_heads = heads // GROUP
    index = group_tile % row_tiles * BLOCK_M + row % rows
    if index >= queries * GROUP:
        return
    batch = group_tile // (key_heads * row_tiles)
    head = group_tile // row_tiles % key_heads * GROUP + index % GROUP
    query = index // GROUP
    alpha, exponent, _, _ = entmax_parameters(alpha_ptr, excess, alpha_ptr, 1.0, head, HAS_ALPHA, False)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)
    low = start // TILE
    high = tl.where(end > start, (end + TILE - 1) // TILE, low)

    columns = tl.arange(0, TILE)
    parts = tl.arange(0, SPLITS)
    slot_rows = (group_tile.to(tl.int64) * splits + parts) * rows + row % rows
    slots = tl.load(
        slots_ptr + slot_rows[:, None] * TILE + columns[None, :], mask=(parts < splits)[:, None], other=float("-inf")
    )
    greatest = tl.max(tl.max(slots, 1), 0)
    empty = greatest == float("-inf")
    # A finite stand-in for infinity keeps the arithmetic of rows that see no key free of NaN.
    origin = tl.where(empty, 0.0, greatest)
    # Counted from the row's maximum, tau lies in [-1, 0): large scores do not cost it digits.
    tau = subset_threshold(slots - origin, 0.0, exponent, alpha, ALPHA_KIND=ALPHA_KIND, STEPS=STEPS)
    floor = float("-inf")
    if HAS_LIST:
        # What was not read has a bound, which stands in for its maximum, of at most this.
        floor = tl.load(bound_ptr + row) - origin
        tau = tl.maximum(tau, floor)

    scan = tl.arange(0, SCAN)
    lists = list_ptr + row.to(tl.int64) * tiles
    count = 0
    for base in range(low, high, SCAN):
        tile = base + scan
        maxima = tl.load(maxima_ptr + row.to(tl.int64) * tiles + tile, mask=tile < high, other=float("-inf"))
        alive = (maxima - origin > tau).to(tl.int32)
        tl.store(lists + count + tl.cumsum(alive, 0) - alive, tile, mask=alive > 0)
        count += tl.sum(alive, 0)
    tl.debug_barrier()

    # The first listed tiles stay in registers: mostly there are no others.
    listed = tl.arange(0, LISTED)
    scores = scores_ptr + (group_tile.to(tl.int64) * tiles * rows + row % rows) * TILE
    tile = tl.load(lists + listed, mask=listed < count, other=0).to(tl.int64)
    held = tl.load(
        scores + tile[:, None] * rows * TILE + columns[None, :], mask=(listed < count)[:, None], other=float("-inf")
    )
    held -= origin
    lower = tau
    upper = tau + 1.001
    resolution = tl.where(alpha > 2.0, 6e-8, 1.5e-7)
    unsettled = (count > 0).to(tl.int32)
    iteration = 0
    final = 0
    # The last round only measures, at the settled point, what is still missing.
    while unsettled > 0:
        p, u = weights(held, tau, exponent, ALPHA_KIND=ALPHA_KIND)
        sums = tl.sum(tl.sum(p, 1), 0)
        slope_sum = tl.sum(tl.sum(u, 1), 0)
        support = tl.sum(tl.sum(tl.where(u > 0, 1.0, 0.0), 1), 0)
        for base in range(LISTED, count, LISTED):
            tile = tl.load(lists + base + listed, mask=base + listed < count, other=0).to(tl.int64)
            x = tl.load(
                scores + tile[:, None] * rows * TILE + columns[None, :],
                mask=(base + listed < count)[:, None],
                other=float("-inf"),
            )
            p, u = weights(x - origin, tau, exponent, ALPHA_KIND=ALPHA_KIND)
            sums += tl.sum(tl.sum(p, 1), 0)
            slope_sum += tl.sum(tl.sum(u, 1), 0)
            support += tl.sum(tl.sum(tl.where(u > 0, 1.0, 0.0), 1), 0)
        lower, upper, step, left = refine(
            tau, lower, upper, sums, slope_sum, support, exponent, alpha, iteration, ALPHA_KIND=ALPHA_KIND, EXACT=True
        )
        left = tl.where(tl.abs(step) <= resolution * tl.abs(tau), 0.0, left)
        correction = last_step(sums, slope_sum, support, exponent, alpha, ALPHA_KIND=ALPHA_KIND)
        point = tau + step
        # For alpha > 2 the lower end: rounding must not lose a key at the threshold, whose slope is nearly infinite.
        if ALPHA_KIND == 0:
            point = tl.where((alpha > 2.0) & (left <= TOLERANCE), lower, point)
        tau = tl.where(final > 0, tau + correction, point)
        unsettled = (final == 0).to(tl.int32)
        iteration += 1
        final = ((left <= TOLERANCE) | (iteration >= 90)).to(tl.int32)
    tau = tl.where(empty, float("inf"), tl.maximum(tau, floor))
    tl.store(origin_ptr + row, origin)
    tl.store(level_ptr + row, tau)
    tl.store(tau_ptr + (batch.to(tl.int64) * heads + head) * queries + query, origin + tau)


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess"])
def _output_kernel(
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
def _sum_kernel(
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


def row_block(rows):
    """Rows of one program: a power of two from 16, what a tensor core multiplies at least."""
    return min(MOST_ROWS, max(16, 1 << (rows - 1).bit_length()))


def split_count(group_tiles, device_index):
    """How many programs share the keys of one key head, at most: a power of two, the same for every length."""
    wanted = PROGRAMS_PER_PROCESSOR * processors(device_index) // group_tiles
    return min(MOST_SPLITS, 1 << max(wanted, 1).bit_length() - 1)


def decode(call, pages=None):
    """Output (B, H, N, D), laid out (B, N, H, D), and tau (B, H, N), +inf in rows that see no key.

    pages: None, or the bounds of the keys' pages, (lower, upper), as `pages.listed_pages` takes them.
    """
    query, key, value = call.query, call.key, call.value
    batch, heads, queries, head_dim = query.shape
    keys, tiles, group = key.shape[2], call.key_tiles, call.group
    device = query.device
    block = row_block(queries * group)
    row_tiles = triton.cdiv(queries * group, block)
    rows = min(block, queries * group)
    group_tiles = batch * key.shape[1] * row_tiles
    most = split_count(group_tiles, device.index)
    splits = min(most, tiles)

    def scratch(*shape, dtype=torch.float32):
        return torch.empty((group_tiles, *shape), dtype=dtype, device=device)

    scores, maxima = scratch(tiles, rows, TILE), scratch(rows, tiles)
    slots, lists = scratch(splits, rows, TILE), scratch(rows, tiles, dtype=torch.int32)
    chosen = scratch(tiles + splits, dtype=torch.int32)
    parts, counts = scratch(splits, rows, head_dim), scratch(splits, dtype=torch.int32)
    origin, level = scratch(rows), scratch(rows)
    tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
    sizes = (heads, queries, keys, tiles, splits, row_tiles, rows)
    constants = {name: call.constants[name] for name in ("GROUP", "ALPHA_KIND", "RANGE_KIND", "HAS_ALPHA")}
    wide = {name: call.constants[name] for name in ("BLOCK_D", "EVEN_D", "PRECISION")}
    masks = {name: call.constants[name] for name in ("HAS_SLOPES", "HAS_MASK")}
    page_list = page_count = bound = None
    if pages is not None:
        from .pages import listed_pages

        page_list, page_count, bound = listed_pages(call, pages, maxima, sizes, block)
    launch = launch_of(query.element_size(), call.block_dim, block)
    _scores_kernel[(group_tiles, splits)](
        query, key, call.alpha_tensor, call.slopes, call.visible, call.mask, page_list, page_count, bound,
        scores, maxima, slots,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *call.visible_strides, *call.mask_strides,
        *sizes, head_dim,
        **constants, **wide, **masks,
        HAS_LIST=pages is not None,
        BLOCK_M=block,
        TILE=TILE,
        SLACK=SLACK,
        **launch,
    )  # fmt: skip
    _threshold_kernel[(group_tiles * rows,)](
        call.alpha_tensor, call.visible, bound, scores, maxima, slots, lists, origin, level, tau,
        call.excess,
        *call.visible_strides,
        *sizes,
        **constants,
        HAS_LIST=pages is not None,
        BLOCK_M=block,
        TILE=TILE,
        SPLITS=most,
        SCAN=SCAN,
        LISTED=LISTED,
        STEPS=STEPS,
        TOLERANCE=1e-9 if call.constants["ALPHA_KIND"] == 15 else 1e-7,
        num_warps=4,
    )  # fmt: skip
    _output_kernel[(group_tiles, splits)](
        value, call.alpha_tensor, call.visible, scores, maxima, origin, level, chosen, parts, counts,
        call.excess,
        *value.stride()[:3], *call.visible_strides,
        *sizes, head_dim,
        **constants, **wide,
        BLOCK_M=block,
        TILE=TILE,
        SCAN=OUTPUT_SCAN,
        **launch,
    )  # fmt: skip
    _sum_kernel[(group_tiles * rows,)](
        parts, counts, out,
        *out.stride()[:3],
        heads, queries, splits, row_tiles, rows, head_dim,
        GROUP=group,
        BLOCK_M=block,
        BLOCK_D=call.block_dim,
        PARTS=PARTS,
        num_warps=4,
    )  # fmt: skip
    return out, tau


def launch_of(element_size, block_dim, block):
    """Warps and pipeline depth for a tile of keys of this width: three tiles in flight where they fit."""
    tile_bytes = TILE * block_dim * element_size
    return {"num_warps": 8 if block >= MOST_ROWS and block_dim > 128 else 4, "num_stages": 3 if tile_bytes <= 32768 else 2}
