"""A ball around the keys of every page of TILE, their minimum and maximum -> a bound of every page, and one of tau.

Exact for every input. A page's score is at most q.c + |q| radius, as no key is farther from the middle c, and at most
sum_d max(q_d lower_d, q_d upper_d), as every key lies between its page's bounds; what rounding can add is added.
tau of some keys is a lower bound of tau of all, and a key not above tau weighs nothing: nor does a page below it.
"""

import torch
import triton
import triton.language as tl

from ..configurations import TILE, processors
from ..tiles import entmax_parameters, masked_scores, row_ranges
from .rows import locate
from .threshold import STEPS, subset_threshold

# Pages whose keys give the lower bound of tau: the newest one, and the best of what so many programs bounded.
SEEDS = 4
PAGES = 64
# Where a program of the first pass over the keys has more pages to read, it asks for their minimum and maximum first.
ASKED = 8
ASKED_AT_ONCE = 32
# Where so many pages are read that it does not pay, the bounds are left alone for as many calls.
REST = 31
# With bounds a step takes as much longer as a program takes for so many tiles, for 1/32 of its own, and for 13/32 of
# those it reads, as tiles of a list come slower. A tile takes 1.4 to 1.7 us. At noise 0.2, where 37 to 40 % are read:
# 94 us for 96 at 128 K x 1, 150 for 156 at 32 K x 8, 480 for 512 at 128 K x 8, 52 for 43 at 32 K x 1, where they rest.
WORTH = 7
# Of products that give bounds.
PRECISION = "tf32"
# Channels read at once where scores are summed without a tensor core.
CHANNELS = 64
# Numbers of the state that a layer keeps: for how many calls its bounds rest, and the tickets that programs have taken
# and how many have arrived, both zero between calls.
STATE = 3


def _margin(head_dim):
    """What rounding can add to a sum of head_dim products, relative to the sum of their sizes, many times over.

    Products are exact in float32 (three tf32 ones nearly so); a tensor core cuts where a processor would round.
    """
    return 4.0 * (head_dim + 16) * 2.0**-23


def page_margin(query):
    """The same for bounds: of float32 they take one tf32 product, as a bound may be coarse."""
    return _margin(query.shape[-1]) + (2.0**-8 if query.element_size() == 4 else 0.0)


@triton.jit
def scaled_bounds(bound, page, end, factor, slope, HAS_SLOPES: tl.constexpr, TILE: tl.constexpr):
    """Bounds of q.k of rows and pages -> bounds of x, the distance of the page's nearest key included."""
    x = bound * factor[:, None]
    if HAS_SLOPES:
        nearest = tl.minimum((page + 1) * TILE, end[:, None]) - end[:, None]
        x += slope[:, None] * nearest.to(tl.float32)
        x += 1e-6 * slope[:, None] * tl.abs(nearest.to(tl.float32))
    return x + 1e-6 * tl.abs(x) + 1e-30


@triton.jit
def ask_pages(
    lists, count, level, maxima_rows, q, end, inside, factor, slope, lower_row, upper_row,
    stride_ln, stride_un, head_dim,
    HAS_SLOPES: tl.constexpr,
    TILE: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MARGIN: tl.constexpr,
):  # fmt: skip
    """Leaves of the listed pages those whose minimum and maximum let a row come above its level too; their number.

    Of the others the bound stands in for the maximum.
    """
    dims = tl.arange(0, BLOCK_D)
    zero = tl.zeros_like(q)
    positive = tl.where(q > 0, q, zero)
    negative = tl.where(q < 0, q, zero)
    left = 0
    for base in range(0, count, PAGES):
        listed = base + tl.arange(0, PAGES)
        page = tl.load(lists + listed, mask=listed < count, other=0)
        page_mask = (listed < count)[:, None] & (dims < head_dim)[None, :]
        lower_rows = lower_row + page.to(tl.int64) * stride_ln
        lower = tl.load(lower_rows[:, None] + dims[None, :], mask=page_mask, other=0.0)
        upper_rows = upper_row + page.to(tl.int64) * stride_un
        upper = tl.load(upper_rows[:, None] + dims[None, :], mask=page_mask, other=0.0)
        bound = tl.dot(positive, tl.trans(upper), input_precision=PRECISION)
        bound = tl.dot(negative, tl.trans(lower), bound, input_precision=PRECISION)
        sizes = tl.maximum(tl.abs(lower.to(tl.float32)), tl.abs(upper.to(tl.float32))).to(lower.dtype)
        bound += MARGIN * tl.dot(positive - negative, tl.trans(sizes), input_precision=PRECISION)
        x = scaled_bounds(bound, page, end, factor, slope, HAS_SLOPES=HAS_SLOPES, TILE=TILE)
        places = maxima_rows[:, None] + page[None, :]
        known = inside[:, None] & (listed < count)[None, :]
        before = tl.load(places, mask=known, other=float("-inf"))
        # A page without bounds has an infinite one, whatever lies where its minimum and maximum would.
        x = tl.where((x < before) & (x > float("-inf")) & (before < float("inf")), x, before)
        alive = tl.max((x > level[:, None]).to(tl.int32), 0)
        tl.store(places, x, mask=known)
        # All of these have been read before one of them is written over.
        tl.debug_barrier()
        tl.store(lists + left + tl.cumsum(alive, 0) - alive, page, mask=alive > 0)
        left += tl.sum(alive, 0)
    return left


@triton.jit
def _ball(ball_row, stride_rn, page, tiles, written, TILE: tl.constexpr):
    """Unit, radius and size of pages; zeros of those that have none."""
    known = ((page + 1) * TILE <= written) & (page < tiles)
    ball = ball_row + page.to(tl.int64) * stride_rn
    unit = tl.load(ball, mask=known, other=0.0)
    radius = tl.load(ball + 1, mask=known, other=0.0)
    return unit, radius, tl.load(ball + 2, mask=known, other=0.0)


@triton.jit
def _bound_pages(
    group_tile, part, programs,
    q_ptr, codes_ptr, ball_ptr, alpha_ptr, slopes_ptr, visible_ptr,
    bounds_ptr, maxima_ptr, best_ptr, chosen_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_cb, stride_cg, stride_cn,
    stride_rb, stride_rg, stride_rn,
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
    """Bounds of every programs-th part of the pages of a group tile, and of each row the page with the best middle."""
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
    largest = tl.max(tl.abs(q.to(tl.float32)), 1)
    largest = tl.where(largest > 0, largest, 1.0)
    direction = q.to(tl.float32) / largest[:, None]
    length = tl.sqrt(tl.sum(direction * direction, 1)) * largest * 1.0001
    broken = tl.max(((q != q) | (tl.abs(q) == float("inf"))).to(tl.int32), 1) > 0
    codes_row = codes_ptr + batch.to(tl.int64) * stride_cb + group.to(tl.int64) * stride_cg
    ball_row = ball_ptr + batch.to(tl.int64) * stride_rb + group.to(tl.int64) * stride_rg
    row = group_tile.to(tl.int64) * rows + local
    # Of every place among those taken at once: to find the best of them once is enough.
    best = tl.full((BLOCK_M, PAGES), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK_M, PAGES), -1, tl.int32)
    page = part * PAGES + tl.arange(0, PAGES)
    unit, radius, size = _ball(ball_row, stride_rn, page, tiles, written, TILE=TILE)
    for base in range(part * PAGES, tiles, programs * PAGES):
        page = base + tl.arange(0, PAGES)
        known = ((page + 1) * TILE <= written) & (page < tiles)
        page_mask = known[:, None] & (dims < head_dim)[None, :]
        code_rows = codes_row + page.to(tl.int64) * stride_cn
        codes = tl.load(code_rows[:, None] + dims[None, :], mask=page_mask, other=0)
        # Asked for a round ahead, as the codes are: nobody waits for them.
        next_unit, next_radius, next_size = _ball(
            ball_row, stride_rn, page + programs * PAGES, tiles, written, TILE=TILE
        )
        # Codes are whole numbers below 128, of which nothing is rounded in any dtype.
        middle = tl.dot(q, tl.trans(codes.to(q.dtype)), input_precision=PRECISION) * unit[None, :]
        bound = middle + length[:, None] * (radius + MARGIN * size)[None, :]
        x = scaled_bounds(bound, page, end, factor, slope, HAS_SLOPES=HAS_SLOPES, TILE=TILE)
        # What is not a number, in the queries or in the keys, hides nothing; nor does a page without bounds.
        x = tl.where((tl.abs(x) < float("inf")) & known & (broken == 0)[:, None], x, float("inf"))
        seen = (page[None, :] * TILE < end[:, None]) & ((page + 1)[None, :] * TILE > start[:, None])
        x = tl.where(seen, x, float("-inf"))
        # Of a page that is not read its bound stands in for its maximum.
        places = row[:, None] * tiles + page[None, :]
        tl.store(bounds_ptr + places, x, mask=inside[:, None] & (page < tiles)[None, :])
        tl.store(maxima_ptr + places, x, mask=inside[:, None] & (page < tiles)[None, :])
        # A seed is the page with a bound whose middle scores best: a ball may reach high because it is large.
        near = scaled_bounds(middle, page, end, factor, slope, HAS_SLOPES=HAS_SLOPES, TILE=TILE)
        near = tl.where((tl.abs(x) < float("inf")) & (tl.abs(near) < float("inf")), near, float("-inf"))
        chosen = tl.where(near > best, page[None, :], chosen)
        best = tl.maximum(best, near)
        unit, radius, size = next_unit, next_radius, next_size
    greatest = tl.max(best, 1)
    place = row * programs + part
    tl.store(best_ptr + place, greatest, mask=inside)
    tl.store(chosen_ptr + place, tl.max(tl.where(best == greatest[:, None], chosen, -1), 1), mask=inside)


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

    # The pages with the best middles among the best of every program, and the newest keys the query sees, which may
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
    q_ptr, k_ptr, codes_ptr, ball_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, state_ptr,
    bounds_ptr, maxima_ptr, best_ptr, chosen_ptr, seed_ptr, bound_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_cb, stride_cg, stride_cn,
    stride_rb, stride_rg, stride_rn,
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
            q_ptr, codes_ptr, ball_ptr, alpha_ptr, slopes_ptr, visible_ptr,
            bounds_ptr, maxima_ptr, best_ptr, chosen_ptr,
            excess, scaling,
            stride_qb, stride_qh, stride_qn,
            stride_cb, stride_cg, stride_cn,
            stride_rb, stride_rg, stride_rn,
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


def bounds_of_pages(call, pages, bounds, maxima, tau, sizes, block, launch):
    """Fills bounds and maxima (row tiles of all key heads, rows, tiles) with the pages' bounds, tau with those of tau.

    pages: as a cache keeps them: lower, upper, codes, ball and state (int32 (3,)): for how many calls they rest still,
    and two counters that are zero before and after. While they rest nothing is filled.
    """
    _, _, codes, ball, state = pages
    query, key = call.query, call.key
    tiles, splits, _, rows = sizes[3:]
    head_dim = query.shape[-1]
    group_tiles = maxima.shape[0]
    device = query.device
    programs = min(splits, triton.cdiv(tiles, PAGES))
    best = torch.empty((group_tiles, rows, programs), dtype=torch.float32, device=device)
    chosen = torch.empty((group_tiles, rows, programs), dtype=torch.int32, device=device)
    seeds = torch.empty((group_tiles, rows, SEEDS), dtype=torch.int32, device=device)
    _bounds_kernel[(group_tiles * (programs + rows),)](
        query, key, codes, ball, call.alpha_tensor, call.slopes, call.visible, call.mask, state,
        bounds, maxima, best, chosen, seeds, tau,
        call.excess, call.scaling,
        *(stride for tensor in (query, key, codes, ball) for stride in tensor.stride()[:3]),
        *call.visible_strides, *call.mask_strides,
        group_tiles, programs, *sizes, head_dim,
        **{name: call.constants[name] for name in ("GROUP", "RANGE_KIND", "HAS_ALPHA", "HAS_SLOPES", "HAS_MASK")},
        ALPHA_KIND=call.alpha_kind,
        BLOCK_M=block,
        TILE=TILE,
        PAGES=PAGES,
        BLOCK_D=call.block_dim,
        PRECISION=PRECISION,
        SEEDS=SEEDS,
        PROGRAMS=triton.next_power_of_2(programs),
        CHANNELS=min(CHANNELS, call.block_dim),
        STEPS=STEPS,
        PAGE_MARGIN=page_margin(query),
        SEED_MARGIN=_margin(head_dim),
        **{**launch, "num_warps": 8 if group_tiles * rows <= processors(device.index) else launch["num_warps"]},
    )  # fmt: skip
