"""Stored scores -> tau, one program per row: a lower bound from the maxima of classes of keys, the keys above it, and
the safeguarded steps of the training kernels over those keys, until what is left is below float32's rounding.

Where they are few, as mostly, the program also adds up their values: the row's output is then done."""

import triton
import triton.language as tl

from ..forward import last_step
from ..refine import refine
from ..tiles import HAS_PTX, entmax_parameters, row_ranges, weights, weights_and_curvature
from .output import add_values

STEPS = 5
# Tiles whose maxima are scanned at once.
SCAN = 1024
# Tiles whose scores are held in registers, or as many keys of any tiles.
HELD = 16
# In at most so many tiles the keys above the bound are looked for, and in how many at once.
SEARCHED = 256
SEARCH = 32
# Keys times channels of the values that are loaded together.
AT_ONCE = 16384


@triton.jit
def _added_two(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _added_three(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


# Sums that pass between warps together. Triton's interpreter takes a step of Python for every element of such a sum.
@triton.jit
def _sums_of_two(p, u):
    if HAS_PTX:
        return tl.reduce((p, u), 0, _added_two)
    else:
        return tl.sum(p, 0), tl.sum(u, 0)


@triton.jit
def _sums_of_three(p, u, w):
    if HAS_PTX:
        return tl.reduce((p, u, w), 0, _added_three)
    else:
        return tl.sum(p, 0), tl.sum(u, 0), tl.sum(w, 0)


@triton.jit
def _newton(tau, total, slope, exponent, alpha, ALPHA_KIND: tl.constexpr):
    """A step from the left by the sums of p and u of some keys of a row: for alpha <= 2 never past the row's tau."""
    if ALPHA_KIND == 15:
        norm_power = tl.sqrt(total)
    elif ALPHA_KIND == 20:
        norm_power = total * 0.0 + 1.0
    else:
        norm_power = tl.exp2(tl.log2(tl.maximum(total, 1.0)) * (1.0 - 1.0 / exponent))
    step = tl.maximum((total - norm_power) / tl.maximum(slope, 1e-30), 0.0)
    return tau + tl.where(alpha <= 2.0, step, 0.0)


@triton.jit
def subset_threshold(x, greatest, exponent, alpha, ALPHA_KIND: tl.constexpr, STEPS: tl.constexpr):
    """A lower bound of tau from some keys of a row, (A,), and the greatest of them."""
    tau = greatest - 1.0
    for _ in range(STEPS):
        p, u = weights(x, tau, exponent, ALPHA_KIND=ALPHA_KIND)
        total, slope = _sums_of_two(p, u)
        tau = _newton(tau, total, slope, exponent, alpha, ALPHA_KIND=ALPHA_KIND)
    # Rounding of the steps must not lift the bound above tau.
    return tau - (1e-6 * tl.abs(tau) + 1e-6)


@triton.jit
def subset_thresholds(x, greatest, exponent, alpha, ALPHA_KIND: tl.constexpr, STEPS: tl.constexpr):
    """The same of many rows (A,) and some keys of each, (A, B)."""
    tau = greatest - 1.0
    for _ in range(STEPS):
        p, u = weights(x, tau[:, None], exponent[:, None], ALPHA_KIND=ALPHA_KIND)
        tau = _newton(tau, tl.sum(p, 1), tl.sum(u, 1), exponent, alpha, ALPHA_KIND=ALPHA_KIND)
    return tau - (1e-6 * tl.abs(tau) + 1e-6)


@triton.jit
def _rest(idle, programs, work_ptr, state_ptr, SCAN: tl.constexpr, REST: tl.constexpr, WORTH: tl.constexpr):
    """Whether the bounds of pages rest from the next call on, from what the programs of this one had to read."""
    read, own = 0, 0
    if idle == 0:
        scan = tl.arange(0, SCAN)
        for base in range(0, programs, SCAN):
            # A step lasts as long as the program with most to read.
            inside = base + scan < programs
            read = tl.maximum(read, tl.max(tl.load(work_ptr + 2 * (base + scan), mask=inside, other=0), 0))
            own = tl.maximum(own, tl.max(tl.load(work_ptr + 2 * (base + scan) + 1, mask=inside, other=0), 0))
    rests = 45 * read + 32 * WORTH > 31 * own
    tl.store(state_ptr, tl.where(idle > 0, idle - 1, tl.where(rests, REST, 0)))


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "splits", "row_tiles", "rows", "excess"])
def threshold_kernel(
    v_ptr, alpha_ptr, visible_ptr, bound_ptr, work_ptr, state_ptr,
    scores_ptr, maxima_ptr, slots_ptr, list_ptr, key_list_ptr, origin_ptr, level_ptr, pending_ptr, arrived_ptr,
    tau_ptr, out_ptr,
    excess,
    stride_wb, stride_wg, stride_wn,
    stride_vb, stride_vn,
    stride_ob, stride_oh, stride_on,
    heads, queries, keys, tiles, splits, row_tiles, rows, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SCAN: tl.constexpr,
    HELD: tl.constexpr,
    SEARCHED: tl.constexpr,
    SEARCH: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    TOLERANCE: tl.constexpr,
    REST: tl.constexpr,
    WORTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if HAS_STATE:
        # Asked for here and used at the end, so that nobody waits for it. Only the first row uses it, and writes it.
        idle = tl.load(state_ptr)
    group_tile = row // rows
    # Nobody has arrived in the pass that follows.
    if row % rows == 0:
        tl.store(arrived_ptr + group_tile, 0)
    key_heads = heads // GROUP
    index = group_tile % row_tiles * BLOCK_M + row % rows
    if index >= queries * GROUP:
        return
    batch = group_tile // (key_heads * row_tiles)
    group = group_tile // row_tiles % key_heads
    head = group * GROUP + index % GROUP
    query = index // GROUP
    alpha, exponent, _, _ = entmax_parameters(alpha_ptr, excess, alpha_ptr, 1.0, head, HAS_ALPHA, False)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, query, queries, keys, RANGE_KIND=RANGE_KIND)
    low = start // TILE
    high = tl.where(end > start, (end + TILE - 1) // TILE, low)

    classes = tl.arange(0, SPLITS * TILE)
    slot_rows = (group_tile.to(tl.int64) * splits + classes // TILE) * rows + row % rows
    slots = tl.load(slots_ptr + slot_rows * TILE + classes % TILE, mask=classes < splits * TILE, other=float("-inf"))
    greatest = tl.max(slots, 0)
    empty = greatest == float("-inf")
    # A finite stand-in for infinity keeps the arithmetic of rows that see no key free of NaN.
    origin = tl.where(empty, 0.0, greatest)
    # Counted from the row's maximum, tau lies in [-1, 0): large scores do not cost it digits.
    tau = subset_threshold(slots - origin, 0.0, exponent, alpha, ALPHA_KIND=ALPHA_KIND, STEPS=STEPS)
    # A tile whose maximum, or the bound that stands in for it, is at most this was not read or not kept.
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

    scores = scores_ptr + (group_tile.to(tl.int64) * tiles * rows + row % rows) * TILE
    entries = tl.arange(0, SEARCH * TILE)
    key_list = key_list_ptr + row.to(tl.int64) * HELD * TILE
    found = 0
    searched = tl.where(count <= SEARCHED, count, 0)
    for base in range(0, searched, SEARCH):
        listed = base + entries // TILE
        tile = tl.load(lists + listed, mask=listed < count, other=0)
        x = tl.load(
            scores + tile.to(tl.int64) * rows * TILE + entries % TILE, mask=listed < count, other=float("-inf")
        )
        above = (x - origin > tau).to(tl.int32)
        place = found + tl.cumsum(above, 0) - above
        tl.store(key_list + place, tile * TILE + entries % TILE, mask=(above > 0) & (place < HELD * TILE))
        found += tl.sum(above, 0)
    tl.debug_barrier()
    entries = tl.arange(0, HELD * TILE)
    few = (count <= SEARCHED) & (found <= HELD * TILE)
    # Few keys, and all that can hold weight; or the first of many tiles.
    first = tl.load(lists + entries // TILE, mask=entries // TILE < count, other=0) * TILE + entries % TILE
    if few:
        first = tl.load(key_list + entries, mask=entries < found, other=0)
    known = entries < tl.where(few, found, count * TILE)
    place = (first // TILE).to(tl.int64) * rows * TILE + first % TILE
    held = tl.load(scores + place, mask=known, other=float("-inf")) - origin
    others = tl.where(few, 0, count)
    lower = tau
    upper = tau + 1.001
    # Above alpha = 2 only a closed bracket settles a row: a small step can stand far from the end that is taken.
    resolution = tl.where(alpha > 2.0, 0.0, 1.5e-7)
    tolerance = tl.where(alpha > 2.0, 0.0, TOLERANCE)
    unsettled = (count > 0).to(tl.int32)
    iteration = 0
    final = 0
    # The last round only measures, at the settled point, what is still missing.
    while unsettled > 0:
        p, u, w = weights_and_curvature(held, tau, exponent, ALPHA_KIND=ALPHA_KIND)
        sums, slope_sum, curvature = _sums_of_three(p, u, w)
        for base in range(HELD, others, HELD):
            listed = base + entries // TILE
            tile = tl.load(lists + listed, mask=listed < count, other=0)
            place = tile.to(tl.int64) * rows * TILE + entries % TILE
            x = tl.load(scores + place, mask=listed < count, other=float("-inf"))
            p, u, w = weights_and_curvature(x - origin, tau, exponent, ALPHA_KIND=ALPHA_KIND)
            more, more_slope, more_curvature = _sums_of_three(p, u, w)
            sums += more
            slope_sum += more_slope
            curvature += more_curvature
        lower, upper, step, left = refine(
            tau, lower, upper, sums, slope_sum, curvature, exponent, alpha, iteration,
            ALPHA_KIND=ALPHA_KIND, EXACT=True,
        )  # fmt: skip
        left = tl.where(tl.abs(step) <= resolution * tl.abs(tau), 0.0, left)
        correction = last_step(sums, slope_sum, curvature, exponent, alpha, ALPHA_KIND=ALPHA_KIND)
        point = tau + step
        # For alpha > 2 the lower end: rounding must not lose a key at the threshold, whose slope is nearly infinite.
        if ALPHA_KIND == 0:
            point = tl.where((alpha > 2.0) & (left <= tolerance), lower, point)
        tau = tl.where(final > 0, tau + correction, point)
        unsettled = (final == 0).to(tl.int32)
        iteration += 1
        final = ((left <= tolerance) | (iteration >= 90)).to(tl.int32)
    tau = tl.where(empty, float("inf"), tl.maximum(tau, floor))
    tl.store(origin_ptr + row, origin)
    tl.store(level_ptr + row, tau)
    tl.store(tau_ptr + (batch.to(tl.int64) * heads + head) * queries + query, origin + tau)
    tl.store(pending_ptr + row, 1 - few.to(tl.int32))
    if few:
        out_row = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        out_row += query.to(tl.int64) * stride_on
        add_values(
            v_ptr + batch.to(tl.int64) * stride_wb + group.to(tl.int64) * stride_wg, out_row,
            key_list, found, scores, origin, tau, exponent, stride_wn, rows, head_dim,
            ALPHA_KIND=ALPHA_KIND, TILE=TILE, BLOCK_D=BLOCK_D, KEYS=KEYS,
        )  # fmt: skip
    # The first row exists in every call. Not one condition: without a state there is nothing to compile.
    if HAS_STATE:  # noqa: SIM102
        if row == 0:
            _rest(idle, tl.num_programs(0) // rows * splits, work_ptr, state_ptr, SCAN=SCAN, REST=REST, WORTH=WORTH)
