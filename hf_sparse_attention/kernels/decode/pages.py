"""Per-channel minimum and maximum and the radius of every page of TILE keys -> a bound of every page, and one of tau.

Exact for every input. A page's score is at most sum_d max(q_d lower_d, q_d upper_d), as every key lies between its
page's bounds, and at most q.c + |q| radius, as no key is farther from the middle c; what rounding can add is added.
tau of some keys is a lower bound of tau of all, and a key not above tau weighs nothing: nor does a page below it.
"""

import torch
import triton
import triton.language as tl

from ..configurations import TILE
from ..operators import _block_dim
from ..tiles import entmax_parameters, masked_scores, row_ranges
from .rows import locate
from .threshold import STEPS, subset_threshold

# Pages whose keys give the lower bound of tau: the newest one, and the best of what so many programs bounded.
SEEDS = 4
PAGES = 32
# Where so many pages are read that it does not pay, the bounds are left alone for as many calls.
REST = 31
# With bounds a step takes as much longer as a program takes for so many tiles, for a sixteenth of its own, and for a
# quarter of those it reads, as tiles of a list come slower. In us, without the last: 15 at 32 K x 1, 21 at 128 K x 1,
# 26 at 32 K x 8, 45 at 128 K x 8; a tile takes 1.4 to 1.6.
WORTH = 7
# Channels read at once where scores are summed without a tensor core.
CHANNELS = 32
# Numbers of the state that a layer keeps: for how many calls its bounds rest, and the tickets that programs have taken
# and how many have arrived, both zero between calls.
STATE = 3


def _margin(head_dim):
    """What rounding can add to a sum of head_dim products, relative to the sum of their sizes, many times over.

    Products are exact in float32 (three tf32 ones nearly so); a tensor core cuts where a processor would round.
    """
    return 4.0 * (head_dim + 16) * 2.0**-23


@triton.jit
def middle(lower, upper, dtype: tl.constexpr):
    """The middle between two bounds in the keys' dtype."""
    return ((lower.to(tl.float32) + upper.to(tl.float32)) * 0.5).to(dtype)


@triton.jit(do_not_specialize=["old_length", "new_length", "pages"])
def _update_kernel(
    k_ptr, lower_ptr, upper_ptr, radius_ptr, length_ptr,
    stride_kb, stride_kg, stride_kn,
    stride_lb, stride_lg, stride_ln,
    stride_ub, stride_ug, stride_un,
    stride_rb, stride_rg,
    key_heads, old_length, new_length, pages, head_dim,
    HAS_LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head_index = tl.program_id(0)
    if HAS_LENGTH:
        # new_length is then how many keys were appended, and the tensor how many there are now.
        length = tl.load(length_ptr).to(tl.int32)
        page = (length - new_length) // TILE + tl.program_id(1)
    else:
        length = new_length
        page = old_length // TILE + tl.program_id(1)
    if ((page + 1) * TILE > length) | (page >= pages):
        return
    batch = (head_index // key_heads).to(tl.int64)
    group = (head_index % key_heads).to(tl.int64)
    rows = page * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < head_dim
    k_rows = k_ptr + batch * stride_kb + group * stride_kg + rows.to(tl.int64) * stride_kn
    k = tl.load(k_rows[:, None] + dims[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    # A key that is not a number makes the page's bounds so, and such a page is always read.
    broken = tl.max((k != k).to(tl.int32), 0) > 0
    lower = tl.where(broken, float("nan"), tl.min(k, 0))
    upper = tl.where(broken, float("nan"), tl.max(k, 0))
    place = batch * stride_lb + group * stride_lg + page.to(tl.int64) * stride_ln
    tl.store(lower_ptr + place + dims, lower.to(lower_ptr.dtype.element_ty), mask=inside)
    place = batch * stride_ub + group * stride_ug + page.to(tl.int64) * stride_un
    tl.store(upper_ptr + place + dims, upper.to(upper_ptr.dtype.element_ty), mask=inside)
    # From the middle as the queries will meet it, rounded; the radius rounded up. Squares of the smallest numbers
    # would vanish: lengths are taken in units of the largest difference.
    distance = k - middle(lower, upper, lower_ptr.dtype.element_ty).to(tl.float32)[None, :]
    unit = tl.max(tl.max(tl.abs(distance), 1), 0)
    unit = tl.where(unit > 0, unit, 1.0)
    distance = distance / unit
    radius = tl.sqrt(tl.max(tl.sum(distance * distance, 1), 0)) * unit * 1.0001
    radius = tl.where(tl.max(broken.to(tl.int32), 0) > 0, float("nan"), radius)
    tl.store(radius_ptr + batch * stride_rb + group * stride_rg + page, radius)


@triton.jit
def _bound_pages(
    group_tile, part, programs,
    q_ptr, lower_ptr, upper_ptr, radius_ptr, alpha_ptr, slopes_ptr, visible_ptr,
    maxima_ptr, best_ptr, chosen_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_lb, stride_lg, stride_ln,
    stride_ub, stride_ug, stride_un,
    stride_rb, stride_rg,
    stride_vb, stride_vn,
    heads, queries, keys, tiles, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MARGIN: tl.constexpr,
):  # fmt: skip
    """Bounds of every programs-th part of the pages of a group tile, and of each row the best of them."""
    batch, group, query, head, inside = locate(group_tile, row_tiles, heads, queries, GROUP=GROUP, BLOCK_M=BLOCK_M)
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    _alpha, _exponent, factor, slope = entmax_parameters(
        alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
    )
    factor = factor + tl.zeros((BLOCK_M,), tl.float32)
    slope = slope + tl.zeros((BLOCK_M,), tl.float32)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)
    end = tl.where(inside, end, 0)
    written = tl.max(end, 0)
    q_rows = head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qn + batch.to(tl.int64) * stride_qb
    q_mask = inside[:, None] & (dims < head_dim)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0)
    zero = tl.zeros_like(q)
    positive = tl.where(q > 0, q, zero)
    negative = tl.where(q < 0, q, zero)
    unit = tl.max(tl.abs(q.to(tl.float32)), 1)
    unit = tl.where(unit > 0, unit, 1.0)
    direction = q.to(tl.float32) / unit[:, None]
    length = tl.sqrt(tl.sum(direction * direction, 1)) * unit * 1.0001
    broken = tl.max(((q != q) | (tl.abs(q) == float("inf"))).to(tl.int32), 1) > 0
    radius_row = radius_ptr + batch.to(tl.int64) * stride_rb + group.to(tl.int64) * stride_rg
    row = group_tile.to(tl.int64) * rows + local
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK_M,), -1, tl.int32)
    for base in range(part * PAGES, tiles, programs * PAGES):
        page = base + tl.arange(0, PAGES)
        known = ((page + 1) * TILE <= written) & (page < tiles)
        page_mask = known[:, None] & (dims < head_dim)[None, :]
        lower_rows = page.to(tl.int64) * stride_ln + batch.to(tl.int64) * stride_lb + group.to(tl.int64) * stride_lg
        lower = tl.load(lower_ptr + lower_rows[:, None] + dims[None, :], mask=page_mask, other=0.0)
        upper_rows = page.to(tl.int64) * stride_un + batch.to(tl.int64) * stride_ub + group.to(tl.int64) * stride_ug
        upper = tl.load(upper_ptr + upper_rows[:, None] + dims[None, :], mask=page_mask, other=0.0)

        bound = tl.dot(positive, tl.trans(upper), input_precision=PRECISION)
        bound = tl.dot(negative, tl.trans(lower), bound, input_precision=PRECISION)
        sizes = tl.maximum(tl.abs(lower.to(tl.float32)), tl.abs(upper.to(tl.float32))).to(lower.dtype)
        radius = tl.load(radius_row + page, mask=known, other=0.0)
        around = tl.dot(q, tl.trans(middle(lower, upper, q.dtype)), input_precision=PRECISION)
        around += length[:, None] * radius[None, :]
        # Where one of them is not a number the other has to do.
        bound = tl.where(around == around, tl.minimum(bound, around), bound)
        bound += MARGIN * tl.dot(positive - negative, tl.trans(sizes), input_precision=PRECISION)
        x = bound * factor[:, None]
        if HAS_SLOPES:
            nearest = tl.minimum((page + 1) * TILE, end[:, None]) - end[:, None]
            x += slope[:, None] * nearest.to(tl.float32)
            x += 1e-6 * slope[:, None] * tl.abs(nearest.to(tl.float32))
        x += 1e-6 * tl.abs(x) + 1e-30
        # What is not a number, in the queries or in the keys, hides nothing; nor does a page without bounds.
        x = tl.where((x == x) & known & (broken == 0)[:, None], x, float("inf"))
        seen = (page[None, :] * TILE < end[:, None]) & ((page + 1)[None, :] * TILE > start[:, None])
        x = tl.where(seen, x, float("-inf"))
        tl.store(maxima_ptr + row[:, None] * tiles + page[None, :], x, mask=inside[:, None] & (page < tiles)[None, :])
        # The best of the pages with a bound is a seed.
        x = tl.where(x < float("inf"), x, float("-inf"))
        greatest = tl.max(x, 1)
        found = tl.max(tl.where(x == greatest[:, None], page[None, :], 0), 1)
        better = greatest > best
        chosen = tl.where(better, found, chosen)
        best = tl.maximum(best, greatest)
    place = row * programs + part
    tl.store(best_ptr + place, best, mask=inside)
    tl.store(chosen_ptr + place, chosen, mask=inside)


@triton.jit
def _bound_tau(
    row, index, group_tile, programs,
    q_ptr, k_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, best_ptr, chosen_ptr, seed_ptr, bound_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, row_tiles, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
    SEEDS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    MARGIN: tl.constexpr,
):  # fmt: skip
    """A lower bound of a row's tau from the keys of its seeds."""
    key_heads = heads // GROUP
    batch = (group_tile // (key_heads * row_tiles)).to(tl.int64)
    group = (group_tile // row_tiles % key_heads).to(tl.int64)
    head = group * GROUP + index % GROUP
    query = index // GROUP
    alpha, exponent, factor, slope = entmax_parameters(
        alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
    )
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)

    # The pages with the largest bounds among the best of every program, and the newest keys the query sees, which may
    # have no bound yet: none of them twice.
    newest = tl.maximum(end - 1, 0) // TILE
    candidates = tl.arange(0, PROGRAMS)
    place = row.to(tl.int64) * programs + candidates
    # Written by other programs of this launch: not from a cache that knows nothing of that.
    best = tl.load(best_ptr + place, mask=candidates < programs, other=float("-inf"), cache_modifier=".cg")
    pages = tl.load(chosen_ptr + place, mask=candidates < programs, other=-1, cache_modifier=".cg")
    best = tl.where(pages == newest, float("-inf"), best)
    seeds = tl.arange(0, SEEDS)
    chosen = tl.where(seeds == 0, newest, -1)
    for seed in range(1, SEEDS):
        greatest = tl.max(best, 0)
        winner = tl.max(tl.where((best == greatest) & (best > float("-inf")), candidates, -1), 0)
        page = tl.max(tl.where(candidates == winner, pages, -1), 0)
        chosen = tl.where(seeds == seed, page, chosen)
        best = tl.where(candidates == winner, float("-inf"), best)
    tl.store(seed_ptr + row * SEEDS + seeds, chosen)
    tl.debug_barrier()

    local = tl.arange(0, SEEDS * TILE)
    page = tl.load(seed_ptr + row * SEEDS + local // TILE)
    columns = page * TILE + local % TILE
    seen = (page >= 0) & (columns >= start) & (columns < end)
    q_row = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qn
    k_rows = k_ptr + batch * stride_kb + group * stride_kg + columns.to(tl.int64) * stride_kn
    channels = tl.arange(0, CHANNELS)
    dots = tl.zeros((SEEDS * TILE,), tl.float32)
    sizes = tl.zeros((SEEDS * TILE,), tl.float32)
    for base in range(0, head_dim, CHANNELS):
        dims = base + channels
        q = tl.load(q_row + dims, mask=dims < head_dim, other=0.0).to(tl.float32)
        k = tl.load(k_rows[:, None] + dims[None, :], mask=seen[:, None] & (dims < head_dim)[None, :], other=0.0).to(
            tl.float32
        )
        products = q[None, :] * k
        dots += tl.sum(products, 1)
        sizes += tl.sum(tl.abs(products), 1)
    # The first pass over these keys sums in another order: what that can take away is taken.
    mask_ptrs = mask_ptr
    if HAS_MASK:
        mask_ptrs += batch * stride_mb + head.to(tl.int64) * stride_mh + query.to(tl.int64) * stride_mn
        mask_ptrs += columns.to(tl.int64) * stride_mk
    x = masked_scores(
        dots - MARGIN * sizes, factor, slope, columns, start, end, mask_ptrs, seen,
        MASKED=True, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
    )  # fmt: skip
    if HAS_SLOPES:
        x -= 1e-6 * slope * tl.abs((columns - end + 1).to(tl.float32))
    x -= 1e-6 * tl.abs(x)
    # Sums that are not numbers bound nothing, and hidden keys were just made so.
    x = tl.where((x == x) & (x < float("inf")) & seen, x, float("-inf"))
    greatest = tl.max(x, 0)
    empty = greatest == float("-inf")
    bound = subset_threshold(x, tl.where(empty, 0.0, greatest), exponent, alpha, ALPHA_KIND=ALPHA_KIND, STEPS=STEPS)
    tl.store(bound_ptr + row, tl.where(empty, float("-inf"), bound))


@triton.jit(
    do_not_specialize=[
        "group_tiles",
        "programs",
        "queries",
        "keys",
        "tiles",
        "splits",
        "row_tiles",
        "rows",
        "excess",
        "scaling",
    ]
)
def _bounds_kernel(
    q_ptr, k_ptr, lower_ptr, upper_ptr, radius_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, state_ptr,
    maxima_ptr, best_ptr, chosen_ptr, seed_ptr, bound_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_lb, stride_lg, stride_ln,
    stride_ub, stride_ug, stride_un,
    stride_rb, stride_rg,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    group_tiles, programs,
    heads, queries, keys, tiles, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SEEDS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    PAGE_MARGIN: tl.constexpr,
    SEED_MARGIN: tl.constexpr,
):  # fmt: skip
    # At rest a launch is all it costs: one for both steps, and nothing is counted.
    if tl.load(state_ptr) > 0:
        return
    # What a program does its ticket says, not its number. Tickets are taken by programs that run, those of the bounds
    # first: who waits for the bounds waits for programs that run or have ended, and that wait for nobody. So all come
    # to an end in whatever order the card starts them, and however few it runs at a time.
    ticket = tl.atomic_add(state_ptr + 1, 1)
    bounding = group_tiles * programs
    if ticket < bounding:
        _bound_pages(
            ticket % group_tiles, ticket // group_tiles, programs,
            q_ptr, lower_ptr, upper_ptr, radius_ptr, alpha_ptr, slopes_ptr, visible_ptr,
            maxima_ptr, best_ptr, chosen_ptr,
            excess, scaling,
            stride_qb, stride_qh, stride_qn,
            stride_lb, stride_lg, stride_ln,
            stride_ub, stride_ug, stride_un,
            stride_rb, stride_rg,
            stride_vb, stride_vn,
            heads, queries, keys, tiles, row_tiles, rows, head_dim,
            GROUP=GROUP, RANGE_KIND=RANGE_KIND, HAS_ALPHA=HAS_ALPHA, HAS_SLOPES=HAS_SLOPES,
            BLOCK_M=BLOCK_M, TILE=TILE, PAGES=PAGES, BLOCK_D=BLOCK_D, PRECISION=PRECISION, MARGIN=PAGE_MARGIN,
        )  # fmt: skip
        # What the threads of this program wrote is seen by whoever sees that it has arrived.
        tl.debug_barrier()
        _arrive(state_ptr)
    else:
        arrived = tl.atomic_add(state_ptr + 2, 0, sem="acquire")
        while arrived < bounding:
            arrived = tl.atomic_add(state_ptr + 2, 0, sem="acquire")
        tl.debug_barrier()
        # Nobody waits for this one: it may arrive before its work is done.
        _arrive(state_ptr)
        row = ticket - bounding
        group_tile = row // rows
        index = group_tile % row_tiles * BLOCK_M + row % rows
        if index < queries * GROUP:
            _bound_tau(
                row, index, group_tile, programs,
                q_ptr, k_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, best_ptr, chosen_ptr, seed_ptr, bound_ptr,
                excess, scaling,
                stride_qb, stride_qh, stride_qn,
                stride_kb, stride_kg, stride_kn,
                stride_vb, stride_vn,
                stride_mb, stride_mh, stride_mn, stride_mk,
                heads, queries, keys, row_tiles, head_dim,
                GROUP=GROUP, ALPHA_KIND=ALPHA_KIND, RANGE_KIND=RANGE_KIND, HAS_ALPHA=HAS_ALPHA, HAS_SLOPES=HAS_SLOPES,
                HAS_MASK=HAS_MASK, TILE=TILE, SEEDS=SEEDS, PROGRAMS=PROGRAMS, CHANNELS=CHANNELS, STEPS=STEPS,
                MARGIN=SEED_MARGIN,
            )  # fmt: skip


@triton.jit
def _arrive(state_ptr):
    """The last of all programs, after which nobody takes a ticket or waits, leaves the counters as it found them."""
    if tl.atomic_add(state_ptr + 2, 1) == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr + 2, 0)


def bounds_of_pages(call, pages, maxima, bound, sizes, block, launch):
    """Fills maxima (row tiles of all key heads, rows, tiles) with the pages' bounds and bound with those of tau.

    pages: lower, upper, radius and state (int32 (3,)): for how many calls they rest still, and two counters that are
    zero before and after; or None, and they never rest. While they rest nothing is filled. Of pages that are not read
    the bounds stand in for the maxima.
    """
    lower, upper, radius, state = pages
    query, key = call.query, call.key
    tiles, splits, _, rows = sizes[3:]
    head_dim = query.shape[-1]
    group_tiles = maxima.shape[0]
    device = query.device
    if state is None:
        state = torch.zeros(STATE, dtype=torch.int32, device=device)
    pages_at_once = PAGES if query.element_size() == 2 else PAGES // 2
    programs = min(splits, triton.cdiv(tiles, pages_at_once))
    best = torch.empty((group_tiles, rows, programs), dtype=torch.float32, device=device)
    chosen = torch.empty((group_tiles, rows, programs), dtype=torch.int32, device=device)
    seeds = torch.empty((group_tiles, rows, SEEDS), dtype=torch.int32, device=device)
    margin = _margin(head_dim)
    _bounds_kernel[(group_tiles * (programs + rows),)](
        query, key, lower, upper, radius, call.alpha_tensor, call.slopes, call.visible, call.mask, state,
        maxima, best, chosen, seeds, bound,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *lower.stride()[:3], *upper.stride()[:3], *radius.stride()[:2],
        *call.visible_strides, *call.mask_strides,
        group_tiles, programs, *sizes, head_dim,
        **{name: call.constants[name] for name in ("GROUP", "RANGE_KIND", "HAS_ALPHA", "HAS_SLOPES", "HAS_MASK")},
        ALPHA_KIND=call.alpha_kind,
        BLOCK_M=block,
        TILE=TILE,
        PAGES=pages_at_once,
        BLOCK_D=call.block_dim,
        # One tf32 product instead of three exact ones: a bound may be coarse, if its margin says how coarse.
        PRECISION="tf32",
        SEEDS=SEEDS,
        PROGRAMS=triton.next_power_of_2(programs),
        CHANNELS=min(CHANNELS, call.block_dim),
        STEPS=STEPS,
        PAGE_MARGIN=margin + (2.0**-8 if query.element_size() == 4 else 0.0),
        SEED_MARGIN=margin,
        **launch,
    )  # fmt: skip


def update_bounds(key, lower, upper, radius, length, old, new):
    """Bounds of the pages that became whole when the keys grew from `old` to `new`.

    With a length tensor it says how many keys there are now, and `new` how many of them were appended.
    """
    batch, key_heads, keys, head_dim = key.shape
    touched = new // TILE + 1 if length is not None else new // TILE - old // TILE
    if touched == 0:
        return
    with torch.cuda.device_of(key):
        _update_kernel[(batch * key_heads, touched)](
            key, lower, upper, radius, length,
            *key.stride()[:3], *lower.stride()[:3], *upper.stride()[:3], *radius.stride()[:2],
            key_heads, old, new, min(lower.shape[2], keys // TILE), head_dim,
            HAS_LENGTH=length is not None,
            TILE=TILE,
            BLOCK_D=_block_dim(head_dim),
            num_warps=4,
        )  # fmt: skip
