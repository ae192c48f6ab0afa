"""Calls whose rows of scores fit into registers: forward in one kernel, backward in another, nothing kept but tau.

A program of the forward holds every score of its rows, so that tau is found there, to float32 rounding. One of the
backward has a whole head of keys: it computes the scores again and walks the query heads of the group one by one.
"""

import torch
import triton
import triton.language as tl

from .backward import _add_queries
from .compiling import Kernel
from .tiles import ENTMAX15, entmax_parameters, key_scores, load_block, row_ranges, weights

# Keys a kernel is compiled for are a multiple of this: lengths in between take the same kernel.
BUCKET = 64
# The most steps to a threshold. Alpha 1.5 takes 3 or 4, a bracket that is halved every third step the most.
STEPS, BRACKET_STEPS = 20, 90


def is_short(configuration, queries, keys):
    """Whether a call of these lengths runs here; the same for real tensors, fake ones and symbolic lengths."""
    return keys <= configuration.short_keys and queries <= configuration.short_keys


@triton.jit
def seen_span(start, end, last_row, queries, keys, RANGE_KIND: tl.constexpr):
    """Half-open range of the keys that some row of a block sees; last_row is the block's last."""
    if RANGE_KIND == 2:
        sees = start < end
        return tl.min(tl.where(sees, start, keys), 0), tl.max(tl.where(sees, end, 0), 0)
    elif RANGE_KIND == 1:
        return 0 * keys, tl.minimum(keys, tl.minimum(last_row, queries - 1) + (keys - queries + 1))
    else:
        return 0 * keys, keys


@triton.jit
def load_keys(source, first, stride, dims, low, high, head_dim, BLOCK_N: tl.constexpr):
    """Rows first.. of one head's keys or values, zeros outside of low..high."""
    rows = first + tl.arange(0, BLOCK_N)
    inside = ((rows >= low) & (rows < high))[:, None] & (dims < head_dim)[None, :]
    return tl.load(source + rows[:, None] * stride + dims[None, :], mask=inside, other=0.0)


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
    # Below the resolution of float32 steps settle nothing.
    resolution = tl.where(alpha > 2.0, 6e-8, 1e-7) * tl.abs(tau)
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
            left = tl.where(alpha > 2.0, exponent * slope_sum * tl.abs(step), left)
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
            unsettled = (tl.max(tl.where(empty, 0.0, left), 0) > TOLERANCE).to(tl.int32)
    if BRACKET:
        # For alpha > 2 the lower end: rounding must not lose a key at the threshold, whose slope is nearly infinite.
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
    # What is taken from a weight p is its share in u.
    share = tl.zeros((BLOCK_M,), tl.float32)
    if ALPHA_KIND == 15:
        # The closed form of this support.
        discriminant = tl.maximum(slope_sum * slope_sum - tl.sum(counts, 1) * missing, 0.0)
        tau += tl.where(positive, missing / (divisor + tl.sqrt(discriminant)), 0.0)
    else:
        # To first order, in the weights and not in tau alone, which float32 rounds. Not for the slopes of alpha > 2,
        # which are not bounded.
        share = tl.where(alpha_head > 2.0, 0.0, tl.where(positive, missing / divisor, 0.0))
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in tl.static_range(TILES):
        if (tile * BLOCK_N < high) & (tile * BLOCK_N + BLOCK_N > low):
            p, u = weights(xs[tile], tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
            if ALPHA_KIND != 15:
                p -= share[:, None] * u
            if EARLY:
                v = vs[tile]
            else:
                v = load_keys(v_base, tile * BLOCK_N, stride_wn, dims, low, high, head_dim, BLOCK_N=BLOCK_N)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    tau = tl.where(empty, float("inf"), tau + share / exponent)
    tl.store(tau_ptr + head_index.to(tl.int64) * queries + rows, tau, mask=row_mask)
    o_base = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    o_pointers = o_base + rows[:, None] * stride_on + dims[None, :]
    tl.store(o_pointers, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (dims < head_dim)[None, :])


@triton.jit
def _scores_and_gradients(
    q, do, k_base, v_base, first, stride_kn, stride_wn, rows, dims, queries, keys, head_dim,
    start, end, factor, slope, mask_base, stride_mn, stride_mk,
    BLOCK_N: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x and g = dout . v of a block of queries and the keys from first on, and those keys."""
    k = load_keys(k_base, first, stride_kn, dims, 0, keys, head_dim, BLOCK_N=BLOCK_N)
    v = load_keys(v_base, first, stride_wn, dims, 0, keys, head_dim, BLOCK_N=BLOCK_N)
    x = key_scores(
        q, k, first, rows, queries, keys, start, end, factor, slope, mask_base, stride_mn, stride_mk,
        BLOCK_N=BLOCK_N, MASKED=True, RANGE_KIND=RANGE_KIND,
        HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
    )  # fmt: skip
    return x, tl.dot(do, tl.trans(v), input_precision=PRECISION), k


@Kernel
@triton.jit(do_not_specialize=["queries", "keys", "row_blocks", "excess", "scaling"])
def _short_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, tau_ptr, pair_ptr,
    dq_ptr, dk_ptr, dv_ptr, dalpha_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_gb, stride_gh, stride_gn,
    stride_db, stride_dh, stride_dn,
    stride_eb, stride_eg, stride_en,
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
    ALPHA_GRADIENT: tl.constexpr,
    TWO_WALKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    groups = heads // GROUP
    batch = program // groups
    group = program % groups
    dims = tl.arange(0, BLOCK_D)
    dim_mask = (dims < head_dim)[None, :]
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + group.to(tl.int64) * stride_kg
    v_base = v_ptr + batch.to(tl.int64) * stride_wb + group.to(tl.int64) * stride_wg
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    for member in range(0, GROUP):
        head = group * GROUP + member
        alpha_head, exponent, factor, slope = entmax_parameters(
            alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
        )
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
        q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        g_base = do_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
        d_base = dq_ptr + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
        tau_base = tau_ptr + (batch * heads + head).to(tl.int64) * queries
        pair_base = pair_ptr + (batch * heads + head).to(tl.int64) * row_blocks * BLOCK_M * 2
        dalpha = tl.zeros((BLOCK_M,), tl.float32)
        for block in range(0, row_blocks):
            first_row = block * BLOCK_M
            rows = first_row + tl.arange(0, BLOCK_M)
            row_mask = rows < queries
            start, end = row_ranges(visible_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND)
            low, high = seen_span(start, end, first_row + BLOCK_M - 1, queries, keys, RANGE_KIND=RANGE_KIND)
            q = load_block(
                q_base, batch, head, first_row, stride_qn, dims, queries, head_dim,
                BLOCK=BLOCK_M, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=False,
            )  # fmt: skip
            do = load_block(
                g_base, batch, head, first_row, stride_gn, dims, queries, head_dim,
                BLOCK=BLOCK_M, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=False,
            )  # fmt: skip
            tau = tl.load(tau_base + rows, mask=row_mask, other=float("inf"))
            hidden = tau == float("inf")
            # Finite and above every score: all weights of the row are zero.
            tau = tl.where(hidden, 1e30, tau)
            # g and its mean from the same products cancel exactly where one key holds the slope.
            u_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for tile in range(low // BLOCK_N, tl.cdiv(high, BLOCK_N)):
                x, gradient, k = _scores_and_gradients(
                    q, do, k_base, v_base, tile * BLOCK_N, stride_kn, stride_wn, rows, dims, queries, keys, head_dim,
                    start, end, factor, slope, mask_base, stride_mn, stride_mk,
                    BLOCK_N=BLOCK_N, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                    PRECISION=PRECISION,
                )  # fmt: skip
                p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
                u_sums += u
                products += u * gradient
            slope_sum = tl.sum(u_sums, 1)
            delta = tl.sum(products, 1) / tl.where(slope_sum > 0, slope_sum, 1.0)
            # Whole blocks, so that the keys need no mask: past the end a finite number above every score.
            tl.store(pair_base + rows * 2, tau)
            tl.store(pair_base + rows * 2 + 1, delta)

            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            # Sums over the keys of g p, g p log p and p log p, for the gradient of alpha.
            gain = tl.zeros((BLOCK_M,), tl.float32)
            gain_entropy = tl.zeros((BLOCK_M,), tl.float32)
            entropy = tl.zeros((BLOCK_M,), tl.float32)
            for tile in range(low // BLOCK_N, tl.cdiv(high, BLOCK_N)):
                x, gradient, k = _scores_and_gradients(
                    q, do, k_base, v_base, tile * BLOCK_N, stride_kn, stride_wn, rows, dims, queries, keys, head_dim,
                    start, end, factor, slope, mask_base, stride_mn, stride_mk,
                    BLOCK_N=BLOCK_N, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                    PRECISION=PRECISION,
                )  # fmt: skip
                p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
                if ALPHA_GRADIENT:
                    p_log = p * tl.log(tl.where(p > 0, p, 1.0))
                    gain += tl.sum(gradient * p, 1)
                    gain_entropy += tl.sum(gradient * p_log, 1)
                    entropy += tl.sum(p_log, 1)
                ds = u * (gradient - delta[:, None])
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
            d_pointers = d_base + rows[:, None] * stride_dn + dims[None, :]
            tl.store(d_pointers, (acc * scaling).to(dq_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask)
            if ALPHA_GRADIENT:
                inverse = 1.0 / (alpha_head - 1.0)
                row_dalpha = (gain - delta) * inverse * inverse - (gain_entropy - delta * entropy) * inverse
                dalpha += tl.where(hidden, 0.0, row_dalpha)
        if ALPHA_GRADIENT:
            tl.store(dalpha_ptr + batch * heads + head, tl.sum(dalpha, 0))

    # What the queries have stored is read by other threads.
    tl.debug_barrier()
    pieces = tl.arange(0, BLOCK_M)
    for tile in range(0, tl.cdiv(keys, BLOCK_N)):
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = columns < keys
        k = load_keys(k_base, tile * BLOCK_N, stride_kn, dims, 0, keys, head_dim, BLOCK_N=BLOCK_N)
        v = load_keys(v_base, tile * BLOCK_N, stride_wn, dims, 0, keys, head_dim, BLOCK_N=BLOCK_N)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        first_block = 0
        if RANGE_KIND == 1:
            # The first query that sees a key of the tile.
            first_block = tl.maximum(tile * BLOCK_N - (keys - queries), 0) // BLOCK_M
        for member in range(0, GROUP):
            head = group * GROUP + member
            alpha_head, exponent, factor, slope = entmax_parameters(
                alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
            )
            mask_base = mask_ptr
            if HAS_MASK:
                mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
            q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
            g_base = do_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
            pair_base = pair_ptr + (batch * heads + head).to(tl.int64) * row_blocks * BLOCK_M * 2
            for block in range(first_block, row_blocks):
                dk, dv = _add_queries(
                    dk, dv, k, v, block * BLOCK_M, q_base, g_base, batch, head, stride_qn, stride_gn, dims, pieces,
                    columns, column_mask, visible_base, stride_vn, pair_base, queries, keys, head_dim,
                    factor, slope, exponent, mask_base, stride_mn, stride_mk, True,
                    ALPHA_KIND=ALPHA_KIND, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                    TWO_WALKS=TWO_WALKS, DESCRIPTORS=False, BLOCK_N=BLOCK_M, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
                    PRECISION=PRECISION,
                )  # fmt: skip
        offsets = batch.to(tl.int64) * stride_eb + group.to(tl.int64) * stride_eg
        offsets = offsets + columns[:, None] * stride_en + dims[None, :]
        inside = column_mask[:, None] & dim_mask
        tl.store(dk_ptr + offsets, (dk * scaling).to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def _blocks(call):
    """What both kernels are compiled for: rows and columns of a block, and how many blocks of columns there are."""
    config = call.configuration
    buckets = (call.key.shape[2] + BUCKET - 1) // BUCKET
    return {
        "BLOCK_M": config.short_rows,
        "BLOCK_N": config.short_columns,
        "TILES": buckets * (BUCKET // config.short_columns),
    }


def attend_short(call):
    """Output (B, H, N, D), laid out (B, N, H, D), and tau (B, H, N)."""
    query, key, value, config = call.query, call.key, call.value, call.configuration
    batch, heads, queries, head_dim = query.shape
    out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=query.device).transpose(1, 2)
    tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    row_blocks = (queries + config.short_rows - 1) // config.short_rows
    # Whether a head's alpha may be above 2.
    bracket = call.alpha_tensor is not None or call.excess > 1
    launch = config.short_forward
    _short_forward_kernel[(batch * heads * row_blocks,)](
        query, key, value, call.alpha_tensor, call.slopes, call.visible, call.mask, tau, out,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, key.shape[2], row_blocks, head_dim,
        **call.constants,
        **_blocks(call),
        BRACKET=bracket,
        STEPS=STEPS if call.alpha_kind == ENTMAX15 else BRACKET_STEPS,
        # Wider rows would take the registers of the scores.
        EARLY=query.element_size() == 2 and call.block_dim <= 64,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.limit(),
    )  # fmt: skip
    return out, tau


def short_gradients(call, grad_out, tau, alpha_gradient):
    """dquery, dkey, dvalue in the inputs' dtype and, if asked for, dalpha (H,) in float32, else None."""
    query, key, value, config = call.query, call.key, call.value, call.configuration
    batch, heads, queries, head_dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    device = query.device
    dquery = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
    dkey = torch.empty((batch, keys, groups, head_dim), dtype=key.dtype, device=device).transpose(1, 2)
    dvalue = torch.empty((batch, keys, groups, head_dim), dtype=value.dtype, device=device).transpose(1, 2)
    dalpha = torch.empty((batch, heads), dtype=torch.float32, device=device) if alpha_gradient else None
    row_blocks = (queries + config.short_rows - 1) // config.short_rows
    # tau and delta of every query side by side, as `_add_queries` reads them.
    pairs = torch.empty((*tau.shape[:2], row_blocks * config.short_rows, 2), dtype=torch.float32, device=device)
    launch = config.short_backward
    _short_backward_kernel[(batch * groups,)](
        query, key, value, grad_out, call.alpha_tensor, call.slopes, call.visible, call.mask, tau, pairs,
        dquery, dkey, dvalue, dalpha,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3],
        *dquery.stride()[:3], *dkey.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, keys, row_blocks, head_dim,
        **call.constants,
        **_blocks(call),
        ALPHA_GRADIENT=alpha_gradient,
        TWO_WALKS=call.two_walks,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.limit(),
    )  # fmt: skip
    return dquery, dkey, dvalue, dalpha.sum(0) if alpha_gradient else None
