"""query, key, value -> output and tau of few keys, every score of a row in registers.

Peters, Niculae, Martins 2019 (arXiv 1905.05702): sum_j [x_j - tau]_+ ^ (1/(alpha-1)) = 1 has one solution.
"""

import torch
import triton
import triton.language as tl

from ..compiling import Kernel
from ..forward import last_step
from ..tiles import ENTMAX15, SOFTMAX, entmax_parameters, key_scores, load_block, row_ranges, weights
from .spans import load_keys, seen_span

# Keys a kernel is compiled for are a multiple of this: lengths in between take the same kernel.
BUCKET = 32
# The most steps to a threshold. Alpha 1.5 takes 3 or 4, a bracket that is halved every third step the most.
STEPS, BRACKET_STEPS = 20, 90


@triton.jit
def threshold_step(
    tau, lower, upper, sums, slope_sum, exponent, alpha, iteration, ALPHA_KIND: tl.constexpr, BRACKET: tl.constexpr
):
    """The next point from the sums of p and u, the new bracket, and how far tau may still be, 0 where it is found.

    alpha <= 2: Newton on the e-norm of [x - tau]_+, e = 1/(alpha - 1), which is convex: never past tau. alpha > 2:
    Newton inside a bracket, halved where Newton leaves it or hardly moves.
    """
    positive = slope_sum > 0
    divisor = tl.where(positive, slope_sum, 1.0)
    # Below the resolution of float32 steps settle nothing. Above alpha = 2 only a closed bracket settles a row: its
    # lower end is taken, which can stand far from a small step that comes from above.
    resolution = tl.where(alpha > 2.0, 0.0, 1e-7) * tl.abs(tau)
    if ALPHA_KIND == 15:
        step = tl.where(positive, (sums - tl.sqrt(sums)) / divisor, 0.0)
        # What such a step leaves; the closed form that follows leaves the square of it.
        left = 3.0 * step * step * slope_sum
    elif ALPHA_KIND == 20:
        step = tl.where(positive, (sums - 1.0) / divisor, 0.0)
        left = slope_sum * tl.abs(step)
    else:
        norm_power = tl.exp2(tl.log2(tl.maximum(sums, 1e-30)) * (1.0 - 1.0 / exponent))
        # Near the threshold Newton on the sum of p itself: fewer roundings.
        near = tl.abs(sums - 1.0) < 0.01
        step = tl.where(near, (sums - 1.0) / exponent, sums - norm_power) / divisor
        step = tl.where(positive, step, 0.0)
        # The correction that follows leaves the square of it.
        left = 1e-3 * exponent * slope_sum * tl.abs(step)
        if BRACKET:
            below = sums >= 1.0
            lower = tl.where(below, tl.maximum(lower, tau), lower)
            upper = tl.where(below, upper, tl.minimum(upper, tau))
            newton = tau + tl.where(positive, (sums - 1.0) / (exponent * divisor), 0.0)
            inside = (newton > lower) & (newton < upper) & (tl.abs(newton - tau) > 0.01 * (upper - lower))
            inside = inside & (iteration % 3 != 2)
            bracketed = tl.where(inside, newton, 0.5 * (lower + upper)) - tau
            settled = (below & (sums <= 1.0 + 2e-7)) | (upper - lower <= 1.2e-7 * tl.abs(tau))
            step = tl.where(alpha > 2.0, tl.where(settled, 0.0, bracketed), step)
            # Right of every key there is no slope, but a way to go.
            left = tl.where(alpha > 2.0, tl.where(positive, exponent * slope_sum, 1.0) * tl.abs(step), left)
    left = tl.where(tl.abs(step) <= resolution, 0.0, left)
    return tau + step, lower, upper, left


@Kernel
@triton.jit(do_not_specialize=["queries", "keys", "row_blocks", "excess", "scaling"])
def _short_forward_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, tau_ptr, out_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_ob, stride_oh, stride_on,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, row_blocks, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BRACKET: tl.constexpr,
    STEPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head_index = program // row_blocks
    # Under a causal mask the last rows see most: they begin first.
    first_row = (row_blocks - 1 - program % row_blocks) * BLOCK_M
    batch = head_index // heads
    head = head_index % heads
    dims = tl.arange(0, BLOCK_D)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < queries
    alpha_head, exponent, factor, slope = entmax_parameters(
        alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
    )
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND)
    low, high = seen_span(start, end, first_row + BLOCK_M - 1, queries, keys, RANGE_KIND=RANGE_KIND)
    q = load_block(
        q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh,
        batch, head, first_row, stride_qn, dims, queries, head_dim,
        BLOCK=BLOCK_M, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=False,
    )  # fmt: skip
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kg
    v_base = v_ptr + batch.to(tl.int64) * stride_wb + (head // GROUP).to(tl.int64) * stride_wg
    ks = ()
    vs = ()
    if EARLY:
        # All loads before the first use of one: a program waits for memory once, and not at all for the values.
        for tile in tl.static_range(TILES):
            ks += (load_keys(k_base, tile * BLOCK_N, stride_kn, dims, low, high, head_dim, BLOCK_N=BLOCK_N),)
        for tile in tl.static_range(TILES):
            vs += (load_keys(v_base, tile * BLOCK_N, stride_wn, dims, low, high, head_dim, BLOCK_N=BLOCK_N),)

    xs = ()
    largest = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    for tile in tl.static_range(TILES):
        x = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        if (tile * BLOCK_N < high) & (tile * BLOCK_N + BLOCK_N > low):
            if EARLY:
                k = ks[tile]
            else:
                k = load_keys(k_base, tile * BLOCK_N, stride_kn, dims, low, high, head_dim, BLOCK_N=BLOCK_N)
            x = key_scores(
                q, k, tile * BLOCK_N, rows, queries, keys, start, end, factor, slope,
                mask_base, stride_mn, stride_mk,
                BLOCK_N=BLOCK_N, MASKED=True, RANGE_KIND=RANGE_KIND,
                HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
            )  # fmt: skip
            largest = tl.maximum(largest, x)
        xs += (x,)
    top = tl.max(largest, 1)
    empty = top == float("-inf")
    # A finite stand-in keeps the arithmetic of rows that see no key free of NaN: all their weights are zero.
    top = tl.where(empty, 0.0, top)
    if ALPHA_KIND == 30:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for tile in tl.static_range(TILES):
            if (tile * BLOCK_N < high) & (tile * BLOCK_N + BLOCK_N > low):
                sums += tl.exp2(xs[tile] - top[:, None])
        # A row that sees nothing has a sum of zero.
        tau = top + tl.log2(tl.maximum(tl.sum(sums, 1), 1e-30))
        step = tl.zeros_like(tau)
        moved = step
    else:
        # No weight is larger than one.
        tau = top - 1.0
        lower = tau
        upper = top
        unsettled = (low < high).to(tl.int32)
        for iteration in range(0, STEPS):
            if unsettled > 0:
                p_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                u_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for tile in tl.static_range(TILES):
                    if (tile * BLOCK_N < high) & (tile * BLOCK_N + BLOCK_N > low):
                        p, u = weights(xs[tile], tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
                        p_sums += p
                        u_sums += u
                tau, lower, upper, left = threshold_step(
                    tau, lower, upper, tl.sum(p_sums, 1), tl.sum(u_sums, 1), exponent, alpha_head, iteration,
                    ALPHA_KIND=ALPHA_KIND, BRACKET=BRACKET,
                )  # fmt: skip
                TOLERANCE: tl.constexpr = 1e-4 if ALPHA_KIND == 15 else 1e-7
                tolerance = tl.where(alpha_head > 2.0, 0.0, TOLERANCE)
                unsettled = (tl.max(tl.where(empty, 0.0, left), 0) > tolerance).to(tl.int32)
        if BRACKET:
            # For alpha > 2 the lower end: rounding must not lose a key at the threshold, its slope is nearly infinite.
            tau = tl.where(alpha_head > 2.0, lower, tau)
        # What is missing at this point. Its support is the true one, but for keys at the edge, and those hardly weigh.
        p_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        u_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        counts = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for tile in tl.static_range(TILES):
            if (tile * BLOCK_N < high) & (tile * BLOCK_N + BLOCK_N > low):
                p, u = weights(xs[tile], tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
                p_sums += p
                u_sums += u
                if ALPHA_KIND == 15:
                    counts += tl.where(u > 0, 1.0, 0.0)
        missing = tl.sum(p_sums, 1) - 1.0
        slope_sum = tl.sum(u_sums, 1)
        positive = slope_sum > 0
        divisor = tl.where(positive, slope_sum, 1.0)
        # What is left to tau is taken from the weights apart: their sum is one to the last digit, tau is rounded.
        if ALPHA_KIND == 15:
            # The closed form of this support.
            discriminant = tl.maximum(slope_sum * slope_sum - tl.sum(counts, 1) * missing, 0.0)
            step = tl.where(positive, missing / (divisor + tl.sqrt(discriminant)), 0.0)
        else:
            # To first order.
            step = tl.where(positive, missing / (exponent * divisor), 0.0)
        moved = tl.zeros_like(step)
        if BRACKET:
            # The slopes of alpha > 2 are not bounded: there the threshold moves, and not far enough to lose a key.
            last = last_step(missing + 1.0, slope_sum, slope_sum, exponent, alpha_head, ALPHA_KIND=ALPHA_KIND)
            moved = tl.where(alpha_head > 2.0, last, 0.0)
            step = tl.where(alpha_head > 2.0, 0.0, step)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in tl.static_range(TILES):
        if (tile * BLOCK_N < high) & (tile * BLOCK_N + BLOCK_N > low):
            if ALPHA_KIND == 15:
                p, u = weights(xs[tile] - tau[:, None], step[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
            elif BRACKET:
                p, u = weights(xs[tile] - tau[:, None], moved[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
                p -= (step * exponent)[:, None] * u
            else:
                p, u = weights(xs[tile], tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
                if ALPHA_KIND != 30:
                    p -= (step * exponent)[:, None] * u
            if EARLY:
                v = vs[tile]
            else:
                v = load_keys(v_base, tile * BLOCK_N, stride_wn, dims, low, high, head_dim, BLOCK_N=BLOCK_N)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    tau = tl.where(empty, float("inf"), tau + (step + moved))
    tl.store(tau_ptr + head_index.to(tl.int64) * queries + rows, tau, mask=row_mask)
    o_base = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    o_pointers = o_base + rows[:, None] * stride_on + dims[None, :]
    tl.store(o_pointers, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (dims < head_dim)[None, :])


def attend_short(call):
    """Output (B, H, N, D), laid out (B, N, H, D), and tau (B, H, N)."""
    query, key, value, config = call.query, call.key, call.value, call.configuration
    batch, heads, queries, head_dim = query.shape
    out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=query.device).transpose(1, 2)
    tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    rows, columns, launch = config.short_rows, config.short_columns, config.short_forward
    row_blocks = (queries + rows - 1) // rows
    buckets = (key.shape[2] + BUCKET - 1) // BUCKET
    _short_forward_kernel[(batch * heads * row_blocks,)](
        query, key, value, call.alpha_tensor, call.slopes, call.visible, call.mask, tau, out,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, key.shape[2], row_blocks, head_dim,
        **call.constants,
        BLOCK_M=rows,
        BLOCK_N=columns,
        TILES=buckets * (BUCKET // columns),
        # Whether a head's alpha may be above 2.
        BRACKET=call.alpha_tensor is not None or (call.excess > 1 and call.alpha_kind != SOFTMAX),
        STEPS=STEPS if call.alpha_kind == ENTMAX15 else BRACKET_STEPS,
        # More than 64 registers each would take those of the scores; float32 is split, which takes more.
        EARLY=query.element_size() == 2 and buckets * BUCKET * call.block_dim <= 64 * 64 * launch.warps,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.limit(),
    )  # fmt: skip
    return out, tau
