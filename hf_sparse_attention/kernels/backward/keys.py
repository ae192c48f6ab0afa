"""The key and value gradients along the lists of queries, summed over the query heads of a group in one program."""

import triton
import triton.language as tl

from ..compiling import Kernel
from ..configurations import TILE
from ..edges import sees
from ..strays import add_strays
from ..tiles import (
    entmax_parameters,
    listed_start,
    load_block,
    masked_scores,
    products,
    row_ranges,
    share_of,
    weights,
)


@triton.jit
def add_queries(
    dk, dv, k, v, first_row, q_source, do_source, batch, head, stride_qn, stride_gn, dims, pieces,
    columns, column_mask, visible_base, stride_vn, pair_base, queries, keys, head_dim,
    factor, slope, exponent, mask_base, stride_mn, stride_mk, cut,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TWO_WALKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys with what the queries from first_row on add to them; cut: not all see it whole."""
    rows = first_row + pieces
    row_mask = rows < queries
    # A bias is measured from the end of the range.
    if HAS_SLOPES:
        start, end = row_ranges(visible_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND, PAIRS=True)
    else:
        start = rows
        end = rows
    q = load_block(
        q_source, batch, head, first_row, stride_qn, dims, queries, head_dim,
        BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
    )  # fmt: skip
    do = load_block(
        do_source, batch, head, first_row, stride_gn, dims, queries, head_dim,
        BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
    )  # fmt: skip
    # One load of pairs: of two vectors every thread would fetch what its part of the tile needs, address by address.
    tau, delta = tl.split(tl.load(pair_base + rows[:, None] * 2 + tl.arange(0, 2)[None, :]))
    if (TWO_WALKS and ALPHA_KIND < 15) or q.dtype == tl.float32:
        # The same products in the same order as for the queries, so that they have the same last bits: tau is that of
        # those scores, and in float32 a score that differs is most of the error. Of a tensor no one knows beforehand.
        x = tl.trans(products(q, k, PRECISION=PRECISION, FIRST=True))
        gradient = tl.trans(tl.dot(do, tl.trans(v), input_precision=PRECISION))
    else:
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        gradient = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    mask_ptrs = mask_base
    inside = True
    if HAS_MASK:
        mask_ptrs = mask_base + rows.to(tl.int64)[None, :] * stride_mn + columns.to(tl.int64)[:, None] * stride_mk
        inside = column_mask[:, None] & row_mask[None, :]
    # As for the queries: the factor last where that is one instruction with tau.
    LATE: tl.constexpr = q.dtype != tl.float32 and (ALPHA_KIND >= 15 or ALPHA_KIND == 1) and not HAS_SLOPES
    x = masked_scores(
        x, 1.0 if LATE else factor, slope, columns[:, None], start[None, :], end[None, :], mask_ptrs, inside,
        MASKED=False, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
    )  # fmt: skip
    if cut:
        if RANGE_KIND == 1:
            # Columns and rows past the end are of no consequence.
            seen = columns[:, None] - rows[None, :] < keys - queries + 1
        else:
            start, end = row_ranges(visible_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND, PAIRS=True)
            seen = sees(columns[:, None], start[None, :], end[None, :], RANGE_KIND=RANGE_KIND)
        x = tl.where(seen, x, float("-inf"))
    if LATE:
        x *= factor
    CLAMPED: tl.constexpr = q.dtype != tl.float32 and ALPHA_KIND != 0
    p, u = weights(x, tau[None, :], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = u * (gradient - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@Kernel
@triton.jit(do_not_specialize=["queries", "keys", "query_tiles", "key_tiles", "at_once", "moved", "excess", "scaling"])
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, q_descriptor, do_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr,
    list_ptr, count_ptr, pair_ptr, dk_ptr, dv_ptr, end_ptr, total_ptr, moved_code_ptr, moved_ptr,
    excess, scaling, moved,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_gb, stride_gh, stride_gn,
    stride_db, stride_dg, stride_dn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, query_tiles, key_tiles, head_dim, at_once,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TWO_WALKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STRAYS: tl.constexpr,
    STRAY_STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    groups = heads // GROUP
    # The heaviest tiles come first: under a causal mask early keys are seen by more queries.
    group_index, key_tile = share_of(program, tl.num_programs(0), key_tiles, at_once)
    batch = group_index // groups
    group = group_index % groups
    local = tl.arange(0, BLOCK)
    pieces = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    columns = key_tile * BLOCK + local
    column_mask = columns < keys
    dim_mask = (dims < head_dim)[None, :]
    tile_mask = column_mask[:, None] & dim_mask
    first = key_tile.to(tl.int64) * BLOCK
    k_base = k_ptr + batch.to(tl.int64) * stride_kb + group.to(tl.int64) * stride_kg + first * stride_kn
    v_base = v_ptr + batch.to(tl.int64) * stride_wb + group.to(tl.int64) * stride_wg + first * stride_wn
    k = tl.load(k_base + local[:, None] * stride_kn + dims[None, :], mask=tile_mask, other=0.0)
    v = tl.load(v_base + local[:, None] * stride_wn + dims[None, :], mask=tile_mask, other=0.0)
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb

    last_key = key_tile * BLOCK + BLOCK
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for member in range(0, GROUP):
        head = group * GROUP + member
        head_index = batch * heads + head
        alpha_head, exponent, factor, slope = entmax_parameters(
            alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
        )
        if DESCRIPTORS:
            q_source = q_descriptor
            do_source = do_descriptor
        else:
            q_source = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
            do_source = do_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
        pair_base = pair_ptr + head_index.to(tl.int64) * query_tiles * (BLOCK * 2)
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
        list_row = head_index.to(tl.int64) * key_tiles + key_tile
        lists = list_ptr + list_row * query_tiles
        PIECES: tl.constexpr = BLOCK // BLOCK_N
        SPLIT: tl.constexpr = RANGE_KIND == 2
        if SPLIT:
            whole = tl.load(count_ptr + list_row * 2) * PIECES
            total = whole + tl.load(count_ptr + list_row * 2 + 1) * PIECES
        else:
            whole = 0
            total = tl.load(count_ptr + list_row) * PIECES
        for index in range(0, total):
            if SPLIT:
                # The tiles that some row's range cuts stand at the end of the row.
                cut = index >= whole
                place = index + tl.where(cut, query_tiles * PIECES - total, 0)
                first_row = listed_start(lists, place, TILE=BLOCK, BLOCK_N=BLOCK_N)
            else:
                first_row = listed_start(lists, index, TILE=BLOCK, BLOCK_N=BLOCK_N)
                cut = first_row + (keys - queries + 1) < last_key if RANGE_KIND == 1 else False
            dk, dv = add_queries(
                dk, dv, k, v, first_row, q_source, do_source, batch, head, stride_qn, stride_gn, dims, pieces,
                columns, column_mask, visible_base, stride_vn, pair_base, queries, keys, head_dim,
                factor, slope, exponent, mask_base, stride_mn, stride_mk, cut,
                ALPHA_KIND=ALPHA_KIND, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                TWO_WALKS=TWO_WALKS, DESCRIPTORS=DESCRIPTORS, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
                PRECISION=PRECISION,
            )  # fmt: skip
    if STRAYS:
        q_base = q_ptr + batch.to(tl.int64) * stride_qb + (group * GROUP).to(tl.int64) * stride_qh
        g_base = do_ptr + batch.to(tl.int64) * stride_gb + (group * GROUP).to(tl.int64) * stride_gh
        dk, dv = add_strays(
            dk, dv, group_index * key_tiles + key_tile, end_ptr, total_ptr, moved_code_ptr, moved_ptr, moved,
            q_base, g_base, stride_qh, stride_qn, stride_gh, stride_gn, queries, local, dims, head_dim,
            TILE=BLOCK, BLOCK_N=BLOCK_N, EVEN_D=EVEN_D, PRECISION=PRECISION, STAGES=STRAY_STAGES,
        )  # fmt: skip
    d_offsets = batch.to(tl.int64) * stride_db + group.to(tl.int64) * stride_dg + first * stride_dn
    d_offsets = d_offsets + local[:, None] * stride_dn + dims[None, :]
    tl.store(dk_ptr + d_offsets, (dk * scaling).to(dk_ptr.dtype.element_ty), mask=tile_mask)
    tl.store(dv_ptr + d_offsets, dv.to(dv_ptr.dtype.element_ty), mask=tile_mask)


def walk_keys(call, grad_out, by_keys, pairs, dkey, dvalue):
    """Fills dkey and dvalue (B, G, K, D) from tau and delta of every query, `pairs`, and what it put into by_keys."""
    query, key, value, config = call.query, call.key, call.value, call.configuration
    batch, heads, queries, head_dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    launch = config.key_gradient
    query_descriptor, gradient_descriptor = call.descriptor(query), call.descriptor(grad_out)
    _key_gradient_kernel[(batch * groups * call.key_tiles,)](
        query, key, value, grad_out, query_descriptor, gradient_descriptor,
        call.alpha_tensor, call.slopes, call.visible, call.mask,
        by_keys.tiles, by_keys.counts, pairs, dkey, dvalue,
        by_keys.ends, by_keys.totals, by_keys.codes, by_keys.weights,
        call.excess, call.scaling, by_keys.room,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3], *dkey.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, keys, call.query_tiles, call.key_tiles, head_dim, call.groups_at_once,
        **call.constants,
        TWO_WALKS=call.two_walks,
        DESCRIPTORS=query_descriptor is not None and gradient_descriptor is not None,
        BLOCK=TILE,
        BLOCK_N=config.inner,
        STRAYS=by_keys.room > 0,
        STRAY_STAGES=config.stray_stages,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.limit(),
    )  # fmt: skip
