"""A lower bound of tau and the listed tiles -> tau, as far as the output pass needs it.

Peters, Niculae, Martins 2019 (arXiv 1905.05702): sum_j [x_j - tau]_+ ^ (1/(alpha-1)) = 1 has one solution. Every pass
walks the listed tiles only; rows stop together, when what is left undone is second order in the output.
"""

import torch
import triton
import triton.language as tl

from .compiling import Kernel
from .configurations import TILE
from .edges import lane_sums
from .strays import stray_arguments, stray_weights
from .tiles import (
    ENTMAX15,
    GENERAL,
    SPARSEMAX,
    entmax_parameters,
    key_scores,
    listed_start,
    load_block,
    row_ranges,
    share_of,
    weights,
    weights_and_curvature,
    whole_span,
)


@triton.jit
def power_step(sums, slope_sum, curvature, exponent):
    """A step from the sums of p, u and w, for exponent e >= 1, and the sum of p that it may leave too much or missing.

    S(tau) = sum [x - tau]_+^e is taken for the power of a line that has its value, slope and second derivative, so
    that a step leaves what is third order: keys that leave the support, each at most step^e, and a change of that
    power. Rigorous: Newton on S^(1/e), which is convex, never passes tau; tau lies within S^(1/e) - 1; a key is above
    S / sum u. The factors 2 and 0.05 are from simulations (NOTES.md).
    """
    logarithm = tl.log(tl.maximum(sums, 1e-30))
    mean = sums / slope_sum
    # S^gain is linear to second order; by Cauchy-Schwarz gain <= 1/e.
    gain = 1.0 - (1.0 - 1.0 / exponent) * mean * (curvature / slope_sum)
    gain = tl.minimum(tl.maximum(gain, -0.5), 1.0 / exponent)
    scaled = gain * logarithm
    near = tl.abs(scaled) < 0.1
    series = 1.0 - scaled / 2.0 * (1.0 - scaled / 3.0 * (1.0 - scaled / 4.0))
    ratio = tl.where(near, series, (1.0 - tl.exp(-scaled)) / tl.where(near, 1.0, scaled))
    step = mean * logarithm * ratio / exponent
    newton = mean * (1.0 - tl.exp(-logarithm / exponent))
    upper = tl.minimum(tl.exp(logarithm / exponent) - 1.0, 0.98 * mean)
    upper = tl.where(sums >= 1.0, tl.maximum(newton, newton + 0.75 * (upper - newton)), 0.0)
    step = tl.minimum(tl.maximum(step, newton), upper)
    change = exponent * slope_sum * tl.abs(step - newton) * tl.abs(logarithm)
    crossing = tl.exp(tl.log(tl.maximum(tl.abs(step), 1e-30)) * exponent)
    return step, 2.0 * crossing + 0.05 * change


@triton.jit
def refine(
    tau,
    low,
    high,
    sums,
    slope_sum,
    curvature,
    exponent,
    alpha,
    iteration,
    ALPHA_KIND: tl.constexpr,
    EXACT: tl.constexpr,
    CURVED: tl.constexpr = True,
):
    """One step from the sums of p, u and w over the support: the new bracket, the step and what it may leave undone.

    alpha 1.5, exact: left of tau Newton on the 2-norm is a lower bound and the closed form of the (larger) support an
    upper one; right of it the closed form of the (smaller) support is a lower bound. alpha <= 2: `power_step`, and
    where the curvature is not known Newton on the e-norm. alpha > 2: Newton inside a bracket, bisection where it
    leaves it. What is left is a sum of p, for alpha 1.5 exact and for alpha > 2 as their tolerances take it.
    """
    positive = slope_sum > 0
    divisor = tl.where(positive, slope_sum, 1.0)
    if ALPHA_KIND == 15 and not EXACT and CURVED:
        step, left = power_step(sums, divisor, curvature, exponent)
        step = tl.where(positive, step, 0.0)
        left = tl.where(positive, left, 0.0)
    elif ALPHA_KIND == 15 and not EXACT:
        step = tl.where(positive, (sums - tl.sqrt(tl.maximum(sums, 0.0))) / divisor, 0.0)
        # Such a step leaves 1.4 step^2 of tau, seldom more than 3, and the slope of the sum is 2 slope_sum.
        left = 3.0 * step * step * slope_sum
    elif ALPHA_KIND == 15:
        discriminant = tl.maximum(slope_sum * slope_sum - curvature * (sums - 1.0), 0.0)
        closed = (sums - 1.0) / (divisor + tl.sqrt(discriminant))
        newton = (sums - tl.sqrt(tl.maximum(sums, 1.0))) / divisor
        below = sums >= 1.0
        low = tl.where(positive, tl.maximum(low, tau + tl.where(below, newton, closed)), low)
        high = tl.where(positive, tl.minimum(high, tau + tl.where(below, closed, 0.0)), high)
        high = tl.maximum(high, low)
        width = high - low
        # At the upper end a key of the support could be missed; slightly left of it none is.
        point = tl.where(iteration < 8, high - 0.25 * width, low)
        step = point - tau
        left = curvature * width * width
    elif ALPHA_KIND == 20:
        step = tl.where(positive, (sums - 1.0) / divisor, 0.0)
        left = slope_sum * tl.abs(step)
    else:
        if alpha <= 2.0:
            step, left = power_step(sums, divisor, curvature, exponent)
            step = tl.where(positive, step, 0.0)
            left = tl.where(positive, left, 0.0)
        else:
            below = sums >= 1.0
            low = tl.where(below, tl.maximum(low, tau), low)
            high = tl.where(below, high, tl.minimum(high, tau))
            newton = tau + tl.where(positive, (sums - 1.0) / (exponent * divisor), 0.0)
            # Where a slope is nearly infinite Newton hardly moves: then the bracket is halved.
            inside = (newton > low) & (newton < high) & (tl.abs(newton - tau) > 0.01 * (high - low))
            inside = inside & (iteration % 3 != 2)
            step = tl.where(inside, newton, 0.5 * (low + high)) - tau
            settled = (below & (sums <= 1.0 + 2e-7)) | (high - low <= 1.2e-7 * tl.abs(tau))
            step = tl.where(settled, 0.0, step)
            # Right of every key there is no slope, but a way to go.
            left = tl.where(positive, exponent * slope_sum, 1.0) * tl.abs(step)
    return low, high, step, left


@Kernel
@triton.jit(
    do_not_specialize=["queries", "keys", "query_tiles", "list_queries", "key_tiles", "at_once", "excess", "scaling"]
)
def _refine_kernel(
    q_ptr, k_ptr, k_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr,
    list_ptr, count_ptr, bound_ptr, state_ptr, tau_ptr, code_ptr, score_ptr, stray_count_ptr,
    excess, scaling,
    stride_sb, stride_sh, stride_sn,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, query_tiles, list_queries, key_tiles, head_dim, at_once,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    CURVED: tl.constexpr,
    STATE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    CLAMPED: tl.constexpr = q_ptr.dtype.element_ty != tl.float32 and ALPHA_KIND != 0
    program = tl.program_id(0)
    head_index, place = share_of(program, tl.num_programs(0), query_tiles, at_once)
    row_tile = query_tiles - 1 - place
    list_row = head_index.to(tl.int64) * query_tiles + row_tile
    count = tl.load(count_ptr + list_row)
    if count < 0:
        return
    lists = list_ptr + list_row * key_tiles
    batch = head_index // heads
    head = head_index % heads
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    rows = row_tile * BLOCK_M + local
    alpha_head, exponent, factor, slope = entmax_parameters(
        alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
    )
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_base += row_tile.to(tl.int64) * BLOCK_M * stride_qn
    row_mask = rows < queries
    dim_mask = (dims < head_dim)[None, :]
    q = tl.load(q_base + local[:, None] * stride_qn + dims[None, :], mask=row_mask[:, None] & dim_mask, other=0.0)
    if DESCRIPTORS:
        k_source = k_descriptor
    else:
        k_source = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kg
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND)
    tau_rows = head_index.to(tl.int64) * queries + rows
    strays = 0
    if ROOM > 0:
        strays = tl.load(stray_count_ptr + head_index.to(tl.int64) * list_queries + row_tile * (BLOCK_M // TILE))
        stray_offset = batch.to(tl.int64) * stride_sb + head.to(tl.int64) * stride_sh
        stray_offset += row_tile.to(tl.int64) * BLOCK_M * stride_sn

    tau = tl.load(bound_ptr + tau_rows, mask=row_mask, other=float("inf"))
    empty = tau == float("inf")
    # A finite stand-in for infinity keeps the arithmetic of rows that see no key free of NaN.
    tau = tl.where(empty, 1e30, tau)
    # The state lives in memory, every pass over the listed tiles reads one slot and writes the other.
    # Two slots of the point and, where there is a bracket, its ends.
    SLOT: tl.constexpr = STATE // 2
    state_base = state_ptr + (head_index.to(tl.int64) * queries + row_tile * BLOCK_M) * STATE
    state = state_base + local * STATE
    tl.store(state, tau, mask=row_mask)
    if SLOT > 1:
        tl.store(state + 1, tau, mask=row_mask)
        tl.store(state + 2, tau + 1.001 + 1e-5 * tl.abs(tau), mask=row_mask)
    pieces = count * (TILE // BLOCK_N)
    whole_first, whole_last = whole_span(
        lists, count, start, end, keys, RANGE_KIND=RANGE_KIND, BLOCK_M=BLOCK_M, TILE=TILE
    )
    whole_first *= TILE // BLOCK_N
    whole_last *= TILE // BLOCK_N
    unsettled = (count + strays > 0).to(tl.int32)
    iteration = 0
    while unsettled > 0:
        tl.debug_barrier()
        current = state + (iteration % 2) * SLOT
        following = state + ((iteration + 1) % 2) * SLOT
        point = tl.load(current, mask=row_mask, other=1e30)
        parts = tl.zeros((BLOCK_M, 4), tl.float32)
        slope_parts = tl.zeros((BLOCK_M, 4), tl.float32)
        curvature_parts = tl.zeros((BLOCK_M, 4), tl.float32)
        for index in range(whole_first, whole_last):
            first = listed_start(lists, index, TILE=TILE, BLOCK_N=BLOCK_N)
            k = load_block(
                k_source, batch, head // GROUP, first, stride_kn, dims, keys, head_dim,
                BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=False, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
            )  # fmt: skip
            x = key_scores(
                q, k, first, rows, queries, keys, start, end, factor, slope, mask_base, stride_mn, stride_mk,
                BLOCK_N=BLOCK_N, MASKED=False, RANGE_KIND=RANGE_KIND,
                HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
            )  # fmt: skip
            if CURVED:
                p, u, w = weights_and_curvature(x, point[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
                curvature_parts += lane_sums(w)
            else:
                p, u = weights(x, point[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
            parts += lane_sums(p)
            slope_parts += lane_sums(u)
        for position in range(whole_last - whole_first, pieces):
            index = position
            if RANGE_KIND == 2:
                # The cut tiles stand on both sides of the whole ones.
                cut = position - (whole_last - whole_first)
                index = tl.where(cut < whole_first, cut, position)
            first = listed_start(lists, index, TILE=TILE, BLOCK_N=BLOCK_N)
            k = load_block(
                k_source, batch, head // GROUP, first, stride_kn, dims, keys, head_dim,
                BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
            )  # fmt: skip
            x = key_scores(
                q, k, first, rows, queries, keys, start, end, factor, slope, mask_base, stride_mn, stride_mk,
                BLOCK_N=BLOCK_N, MASKED=True, RANGE_KIND=RANGE_KIND,
                HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
            )  # fmt: skip
            if CURVED:
                p, u, w = weights_and_curvature(x, point[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
                curvature_parts += lane_sums(w)
            else:
                p, u = weights(x, point[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
            parts += lane_sums(p)
            slope_parts += lane_sums(u)
        if ROOM > 0:
            for index in tl.range(0, tl.cdiv(strays, BLOCK_N), num_stages=1):
                if CURVED:
                    p, u, w, entries, held, own, chosen = stray_weights(
                        code_ptr, score_ptr, stray_offset, stride_sn, index, strays, local, point,
                        state_base + (iteration % 2) * SLOT, exponent,
                        ALPHA_KIND=ALPHA_KIND, ROOM=ROOM, BLOCK_N=BLOCK_N, POINTS=STATE, CURVED=True,
                    )  # fmt: skip
                    curvature_parts += lane_sums(w)
                else:
                    p, u, entries, held, own, chosen = stray_weights(
                        code_ptr, score_ptr, stray_offset, stride_sn, index, strays, local, point,
                        state_base + (iteration % 2) * SLOT, exponent,
                        ALPHA_KIND=ALPHA_KIND, ROOM=ROOM, BLOCK_N=BLOCK_N, POINTS=STATE,
                    )  # fmt: skip
                parts += lane_sums(p)
                slope_parts += lane_sums(u)
        sums = tl.sum(parts, 1)
        slope_sum = tl.sum(slope_parts, 1)
        curvature = tl.sum(curvature_parts, 1)
        if SLOT > 1:
            lower = tl.load(current + 1, mask=row_mask, other=1e30)
            upper = tl.load(current + 2, mask=row_mask, other=1e30)
        else:
            lower = point
            upper = point
        lower, upper, step, left = refine(
            point, lower, upper, sums, slope_sum, curvature, exponent, alpha_head, iteration,
            ALPHA_KIND=ALPHA_KIND, EXACT=EXACT, CURVED=CURVED,
        )  # fmt: skip
        # Steps below the resolution of float32 settle nothing. Above alpha = 2 only a closed bracket settles a row: a
        # small step can stand far from the end that is taken.
        resolution = tl.where(alpha_head > 2.0, 0.0, 1.5e-7)
        left = tl.where(empty | (tl.abs(step) <= resolution * tl.abs(point)), 0.0, left)
        tl.store(following, tl.where(empty, point, point + step), mask=row_mask)
        if SLOT > 1:
            tl.store(following + 1, lower, mask=row_mask)
            tl.store(following + 2, upper, mask=row_mask)
        iteration += 1
        tolerance = TOLERANCE
        if ALPHA_KIND < 15:
            # The slopes of alpha > 2 are not bounded at the threshold: tau is needed to its last digits in any dtype.
            tolerance = tl.where(alpha_head > 2.0, 0.0, TOLERANCE)
        unsettled = ((tl.max(left, 0) > tolerance) & (iteration < 90)).to(tl.int32)

    tl.debug_barrier()
    tau = tl.load(state + (iteration % 2) * SLOT, mask=row_mask, other=1e30)
    if ALPHA_KIND < 15:
        # For alpha > 2 the lower end: rounding must not lose a key at the threshold, whose slope is nearly infinite.
        lower = tl.load(state + (iteration % 2) * SLOT + 1, mask=row_mask, other=1e30)
        tau = tl.where(alpha_head > 2.0, tl.where(tau < 1e30, lower, tau), tau)
    tl.store(tau_ptr + tau_rows, tau, mask=row_mask)


def refined_threshold(call, bound, lists, save, strays=None):
    """A point next to tau (B, H, N), nearer where the output is not corrected to first order; 1e30 without a key."""
    query, key, config = call.query, call.key, call.configuration
    batch, heads, queries, head_dim = query.shape
    tau = torch.empty_like(bound)
    near = save or not call.sums_means(save)
    # How much the sum of p may be off. Where the output is corrected to first order it errs by the square of this; the
    # mean of the values, which a backward reads in half precision, is not corrected, and neither is an output that is
    # only divided by the sum: they err by as much.
    kind = call.constants["ALPHA_KIND"]
    exact = query.dtype == torch.float32 or kind == GENERAL
    if exact:
        tolerance = {ENTMAX15: 1e-9, SPARSEMAX: 1e-7}.get(kind, 3e-5)
    elif kind == SPARSEMAX:
        tolerance = 1e-2
    else:
        tolerance = 5e-3 if near else 3e-2
    # The sum that makes a pass third order costs 2 instructions a score.
    curved = kind < ENTMAX15 or (kind == ENTMAX15 and (exact or near))
    slots = 8 if exact or kind != ENTMAX15 else 2
    state = torch.empty((batch, heads, queries, slots), dtype=torch.float32, device=query.device)
    for rows, tiles, counts in lists.walks():
        stray_pointers, room = stray_arguments(strays, rows)
        launch = config.refine if rows == TILE else config.refine_pairs
        _refine_kernel[(counts.numel(),)](
            query, key, call.descriptor(key), call.alpha_tensor, call.slopes, call.visible, call.mask,
            tiles, counts, bound, state, tau, *stray_pointers[:3],
            call.excess, call.scaling,
            *stray_pointers[3:],
            *query.stride()[:3], *key.stride()[:3], *call.visible_strides, *call.mask_strides,
            heads, queries, key.shape[2], counts.shape[2], call.query_tiles, call.key_tiles, head_dim,
            call.heads_at_once,
            **call.constants,
            DESCRIPTORS=call.descriptors,
            BLOCK_M=rows,
            BLOCK_N=config.inner,
            TILE=TILE,
            EXACT=exact,
            CURVED=curved,
            STATE=state.shape[-1],
            TOLERANCE=tolerance,
            ROOM=room,
            num_warps=launch.warps,
            num_stages=launch.stages,
            **launch.limit(),
        )  # fmt: skip
    return tau
