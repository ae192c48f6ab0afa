"""Gradients of few keys from the saved tau: dz = u * (g - delta), g = dout . v, delta the mean of g under u.

One kernel for the queries and one for the keys and values, summed over the query heads of the group inside a program:
no atomics, the same bits every run.
"""

import torch
import triton
import triton.language as tl

from ..backward import add_queries
from ..compiling import Kernel
from ..tiles import alpha_slopes, entmax_parameters, key_scores, load_block, row_ranges, weights
from .spans import load_keys, seen_span


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
def _short_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, tau_ptr,
    pair_ptr, dq_ptr, dalpha_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_gb, stride_gh, stride_gn,
    stride_db, stride_dh, stride_dn,
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
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ALPHA_GRADIENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head_index = program // row_blocks
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
    do = load_block(
        do_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh,
        batch, head, first_row, stride_gn, dims, queries, head_dim,
        BLOCK=BLOCK_M, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=False,
    )  # fmt: skip
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kg
    v_base = v_ptr + batch.to(tl.int64) * stride_wb + (head // GROUP).to(tl.int64) * stride_wg
    tau_rows = head_index.to(tl.int64) * queries + rows
    tau = tl.load(tau_ptr + tau_rows, mask=row_mask, other=float("inf"))
    hidden = tau == float("inf")
    # Finite and above every score: all weights of the row are zero.
    tau = tl.where(hidden, 1e30, tau)
    first_tile = low // BLOCK_N
    end_tile = tl.cdiv(high, BLOCK_N)
    # g and its mean from the same products cancel exactly where one key holds the slope.
    u_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(first_tile, end_tile):
        x, gradient, k = _scores_and_gradients(
            q, do, k_base, v_base, tile * BLOCK_N, stride_kn, stride_wn, rows, dims, queries, keys, head_dim,
            start, end, factor, slope, mask_base, stride_mn, stride_mk,
            BLOCK_N=BLOCK_N, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
        )  # fmt: skip
        p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
        u_sums += u
        products += u * gradient
    slope_sum = tl.sum(u_sums, 1)
    delta = tl.sum(products, 1) / tl.where(slope_sum > 0, slope_sum, 1.0)
    # Whole blocks, so that the key gradient needs no mask: past the end a finite number above every score.
    pair_rows = (head_index.to(tl.int64) * row_blocks * BLOCK_M + rows) * 2
    tl.store(pair_ptr + pair_rows, tau)
    tl.store(pair_ptr + pair_rows + 1, delta)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # The sum over the keys of (g - delta) dp/dalpha.
    gain = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(first_tile, end_tile):
        x, gradient, k = _scores_and_gradients(
            q, do, k_base, v_base, tile * BLOCK_N, stride_kn, stride_wn, rows, dims, queries, keys, head_dim,
            start, end, factor, slope, mask_base, stride_mn, stride_mk,
            BLOCK_N=BLOCK_N, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
        )  # fmt: skip
        p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
        gradient -= delta[:, None]
        if ALPHA_GRADIENT:
            gain += tl.sum(gradient * alpha_slopes(p, u, alpha_head - 1.0, ALPHA_KIND=ALPHA_KIND), 1)
        ds = u * gradient
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    d_base = dq_ptr + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    tl.store(
        d_base + rows[:, None] * stride_dn + dims[None, :],
        (acc * scaling).to(dq_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (dims < head_dim)[None, :],
    )
    if ALPHA_GRADIENT:
        inverse = 1.0 / (alpha_head - 1.0)
        tl.store(dalpha_ptr + tau_rows, tl.where(hidden, 0.0, gain * inverse * inverse), mask=row_mask)


@Kernel
@triton.jit(do_not_specialize=["queries", "keys", "row_blocks", "key_tiles", "excess", "scaling"])
def _short_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, pair_ptr, dk_ptr, dv_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_gb, stride_gh, stride_gn,
    stride_db, stride_dg, stride_dn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, row_blocks, key_tiles, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    TWO_WALKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    groups = heads // GROUP
    # Under a causal mask early keys are seen by more queries: they come first.
    tile = program % key_tiles
    batch = program // key_tiles // groups
    group = program // key_tiles % groups
    dims = tl.arange(0, BLOCK_D)
    pieces = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < keys
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + group.to(tl.int64) * stride_kg
    v_base = v_ptr + batch.to(tl.int64) * stride_wb + group.to(tl.int64) * stride_wg
    k = load_keys(k_base, tile * BLOCK_N, stride_kn, dims, 0, keys, head_dim, BLOCK_N=BLOCK_N)
    v = load_keys(v_base, tile * BLOCK_N, stride_wn, dims, 0, keys, head_dim, BLOCK_N=BLOCK_N)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    # The queries that see a key of the tile.
    first_block = 0
    end_block = row_blocks
    if RANGE_KIND == 1:
        first_block = tl.maximum(tile * BLOCK_N - (keys - queries), 0) // BLOCK_M
    elif RANGE_KIND == 2:
        every = tl.arange(0, ROWS)
        start, end = row_ranges(visible_base, stride_vn, every, queries, keys, RANGE_KIND=RANGE_KIND)
        sees = (start < end) & (start < tile * BLOCK_N + BLOCK_N) & (end > tile * BLOCK_N)
        first_block = tl.min(tl.where(sees, every, ROWS), 0) // BLOCK_M
        end_block = (tl.max(tl.where(sees, every, -1), 0) + BLOCK_M) // BLOCK_M
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
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
        for block in range(first_block, end_block):
            dk, dv = add_queries(
                dk, dv, k, v, block * BLOCK_M, q_base, g_base, batch, head, stride_qn, stride_gn, dims, pieces,
                columns, column_mask, visible_base, stride_vn, pair_base, queries, keys, head_dim,
                factor, slope, exponent, mask_base, stride_mn, stride_mk, True,
                ALPHA_KIND=ALPHA_KIND, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                TWO_WALKS=TWO_WALKS, DESCRIPTORS=False, BLOCK_N=BLOCK_M, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
                PRECISION=PRECISION,
            )  # fmt: skip
    offsets = batch.to(tl.int64) * stride_db + group.to(tl.int64) * stride_dg
    offsets = offsets + columns[:, None] * stride_dn + dims[None, :]
    inside = column_mask[:, None] & (dims < head_dim)[None, :]
    tl.store(dk_ptr + offsets, (dk * scaling).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def short_gradients(call, grad_out, tau, alpha_gradient):
    """dquery, dkey, dvalue in the inputs' dtype and, if asked for, dalpha (H,) in float32, else None."""
    query, key, value, config = call.query, call.key, call.value, call.configuration
    batch, heads, queries, head_dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    device = query.device
    dquery = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
    dkey = torch.empty((batch, keys, groups, head_dim), dtype=key.dtype, device=device).transpose(1, 2)
    dvalue = torch.empty((batch, keys, groups, head_dim), dtype=value.dtype, device=device).transpose(1, 2)
    dalpha = torch.empty_like(tau) if alpha_gradient else None
    rows, columns = config.short_rows, config.short_columns
    row_blocks, key_tiles = (queries + rows - 1) // rows, (keys + columns - 1) // columns
    # tau and delta of every query side by side, as the key gradient reads them.
    pairs = torch.empty((batch, heads, row_blocks * rows, 2), dtype=torch.float32, device=device)
    launch = config.short_query_gradient
    _short_query_gradient_kernel[(batch * heads * row_blocks,)](
        query, key, value, grad_out, call.alpha_tensor, call.slopes, call.visible, call.mask, tau,
        pairs, dquery, dalpha,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3], *dquery.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, keys, row_blocks, head_dim,
        **call.constants,
        BLOCK_M=rows,
        BLOCK_N=columns,
        ALPHA_GRADIENT=alpha_gradient,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.limit(),
    )  # fmt: skip
    launch = config.short_key_gradient
    _short_key_gradient_kernel[(batch * groups * key_tiles,)](
        query, key, value, grad_out, call.alpha_tensor, call.slopes, call.visible, call.mask, pairs, dkey, dvalue,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3], *dkey.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, keys, row_blocks, key_tiles, head_dim,
        **call.constants,
        BLOCK_M=rows,
        BLOCK_N=columns,
        TWO_WALKS=call.two_walks,
        ROWS=triton.next_power_of_2(queries) if call.visible is not None else 1,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.limit(),
    )  # fmt: skip
    return dquery, dkey, dvalue, dalpha.sum((0, 2)) if alpha_gradient else None
