"""The query gradient along the lists of tiles, that of alpha, and tau and delta as the key gradient reads them."""

import triton
import triton.language as tl

from ..compiling import Kernel
from ..configurations import TILE
from ..edges import edge_scores, seen_by_all, turn_start, turns
from ..near import settled
from ..strays import gather_rows, move_strays, stray_arguments, stray_weights
from ..tiles import (
    alpha_slopes,
    entmax_parameters,
    key_scores,
    listed_start,
    load_block,
    row_ranges,
    share_of,
    weights,
)


@Kernel
@triton.jit(
    do_not_specialize=[
        "queries",
        "keys",
        "query_tiles",
        "list_queries",
        "key_tiles",
        "at_once",
        "moved",
        "excess",
        "scaling",
    ]
)
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr,
    list_ptr, count_ptr, tau_ptr, mean_ptr, do_ptr, pair_ptr, dq_ptr, dalpha_ptr,
    code_ptr, score_ptr, stray_count_ptr, start_ptr, end_ptr, total_ptr, moved_code_ptr, moved_ptr,
    excess, scaling,
    stride_sb, stride_sh, stride_sn, moved,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_ob, stride_oh, stride_on,
    stride_gb, stride_gh, stride_gn,
    stride_db, stride_dh, stride_dn,
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
    ALPHA_GRADIENT: tl.constexpr,
    TWO_WALKS: tl.constexpr,
    NEAR: tl.constexpr,
    ROOM: tl.constexpr,
    STRAY_STAGES: tl.constexpr,
):  # fmt: skip
    CLAMPED: tl.constexpr = q_ptr.dtype.element_ty != tl.float32 and ALPHA_KIND != 0
    program = tl.program_id(0)
    head_index, place = share_of(program, tl.num_programs(0), query_tiles, at_once)
    row_tile = query_tiles - 1 - place
    list_row = head_index.to(tl.int64) * query_tiles + row_tile
    count = tl.load(count_ptr + list_row)
    if NEAR:
        count = settled(count)
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
        v_source = v_descriptor
    else:
        k_source = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kg
        v_source = v_ptr + batch.to(tl.int64) * stride_wb + (head // GROUP).to(tl.int64) * stride_wg
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    visible_base = visible_ptr
    if RANGE_KIND == 2:
        visible_base += batch.to(tl.int64) * stride_vb
    start, end = row_ranges(visible_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND)
    tau_row = head_index.to(tl.int64) * queries + row_tile * BLOCK_M
    tau_rows = tau_row + local
    strays = 0
    if ROOM > 0:
        strays = tl.load(stray_count_ptr + head_index.to(tl.int64) * list_queries + row_tile * (BLOCK_M // TILE))
        stray_offset = batch.to(tl.int64) * stride_sb + head.to(tl.int64) * stride_sh
        stray_offset += row_tile.to(tl.int64) * BLOCK_M * stride_sn
        k_base = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kg
        w_base = v_ptr + batch.to(tl.int64) * stride_wb + (head // GROUP).to(tl.int64) * stride_wg

    tile_mask = row_mask[:, None] & dim_mask
    first_row = row_tile.to(tl.int64) * BLOCK_M
    o_offset = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + first_row * stride_on
    g_base = do_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh + first_row * stride_gn
    d_base = dq_ptr + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh + first_row * stride_dn
    do = tl.load(g_base + local[:, None] * stride_gn + dims[None, :], mask=tile_mask, other=0.0)
    tau = tl.load(tau_ptr + tau_rows, mask=row_mask, other=float("inf"))
    pieces = count * (TILE // BLOCK_N)
    if TWO_WALKS:
        # g and its mean from the same products cancel exactly where one key holds the slope; a stored mean would not.
        slope_sum = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        walked_pieces = pieces
        walked_strays = strays
        if ALPHA_KIND == 2:
            # In half precision only heads of alpha > 2 need it: the others walk nothing here.
            walked_pieces = tl.where(alpha_head > 2.0, pieces, 0)
            walked_strays = tl.where(alpha_head > 2.0, strays, 0)
        for index in range(0, walked_pieces):
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
            v = load_block(
                v_source, batch, head // GROUP, first, stride_wn, dims, keys, head_dim,
                BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
            )  # fmt: skip
            gradient = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
            slope_sum += tl.sum(u, 1)
            delta += tl.sum(u * gradient, 1)
        if ROOM > 0:
            for index in tl.range(0, tl.cdiv(walked_strays, BLOCK_N), num_stages=STRAY_STAGES):
                p, u, entries, held, own, chosen = stray_weights(
                    code_ptr, score_ptr, stray_offset, stride_sn, index, strays, local, tau, tau_ptr + tau_row,
                    exponent, ALPHA_KIND=ALPHA_KIND, ROOM=ROOM, BLOCK_N=BLOCK_N, POINTS=1,
                )  # fmt: skip
                v = gather_rows(w_base + chosen.to(tl.int64) * stride_wn, held, dims, head_dim, EVEN_D=EVEN_D)
                gradient = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                slope_sum += tl.sum(u, 1)
                delta += tl.sum(u * gradient, 1)
        delta /= tl.where(slope_sum > 0, slope_sum, 1.0)
    if not TWO_WALKS or ALPHA_KIND == 2:
        mean = tl.load(mean_ptr + o_offset + local[:, None] * stride_on + dims[None, :], mask=tile_mask, other=0.0)
        stored = tl.sum(do.to(tl.float32) * mean, 1)
        delta = tl.where(alpha_head > 2.0, delta, stored) if TWO_WALKS else stored
    # Whole tiles, so that the key gradient needs no mask: past the end a finite number above every score.
    padded = list_queries * TILE
    pair_rows = (head_index.to(tl.int64) * padded + rows) * 2
    tl.store(pair_ptr + pair_rows, tl.where(row_mask, tau, 1e30), mask=rows < padded)
    tl.store(pair_ptr + pair_rows + 1, delta, mask=rows < padded)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Sums over the keys, for the gradient of alpha: (g - delta) m and m, where m is how alpha moves a weight, and
    # (g - delta) u and u, from the same products: how far delta is off the mean of g, as a stored mean errs.
    gain = tl.zeros((BLOCK_M,), tl.float32)
    move = tl.zeros((BLOCK_M,), tl.float32)
    slope_gain = tl.zeros((BLOCK_M,), tl.float32)
    slopes = tl.zeros((BLOCK_M,), tl.float32)
    seen_start, seen_end = seen_by_all(start, end, keys)
    for index in range(0, turns(pieces)):
        first = turn_start(lists, index, pieces, key_tiles, TILE=TILE, BLOCK_N=BLOCK_N)
        k = load_block(
            k_source, batch, head // GROUP, first, stride_kn, dims, keys, head_dim,
            BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip
        x = edge_scores(
            q, k, first, rows, queries, keys, start, end, seen_start, seen_end, factor, slope,
            mask_base, stride_mn, stride_mk,
            BLOCK_N=BLOCK_N, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
            FUSED=q_ptr.dtype.element_ty != tl.float32 and (ALPHA_KIND >= 15 or ALPHA_KIND == 1),
        )  # fmt: skip
        v = load_block(
            v_source, batch, head // GROUP, first, stride_wn, dims, keys, head_dim,
            BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip
        gradient = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
        if ALPHA_GRADIENT:
            moves = alpha_slopes(p, u, alpha_head - 1.0, ALPHA_KIND=ALPHA_KIND)
            gain += tl.sum(gradient * moves, 1)
            move += tl.sum(moves, 1)
            slope_gain += tl.sum(gradient * u, 1)
            slopes += tl.sum(u, 1)
        ds = u * gradient
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    if ROOM > 0:
        for index in tl.range(0, tl.cdiv(strays, BLOCK_N), num_stages=STRAY_STAGES):
            p, u, entries, held, own, chosen = stray_weights(
                code_ptr, score_ptr, stray_offset, stride_sn, index, strays, local, tau, tau_ptr + tau_row, exponent,
                ALPHA_KIND=ALPHA_KIND, ROOM=ROOM, BLOCK_N=BLOCK_N, POINTS=1,
            )  # fmt: skip
            k = gather_rows(k_base + chosen.to(tl.int64) * stride_kn, held, dims, head_dim, EVEN_D=EVEN_D)
            v = gather_rows(w_base + chosen.to(tl.int64) * stride_wn, held, dims, head_dim, EVEN_D=EVEN_D)
            gradient = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
            if ALPHA_GRADIENT:
                moves = alpha_slopes(p, u, alpha_head - 1.0, ALPHA_KIND=ALPHA_KIND)
                gain += tl.sum(gradient * moves, 1)
                move += tl.sum(moves, 1)
                slope_gain += tl.sum(gradient * u, 1)
                slopes += tl.sum(u, 1)
            ds = u * gradient
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
            move_strays(
                p, ds, entries, held, chosen, (head % GROUP) * queries + row_tile * BLOCK_M + own,
                head_index, batch * (heads // GROUP) + head // GROUP, row_tile * (BLOCK_M // TILE),
                start_ptr, end_ptr, total_ptr, moved_code_ptr, moved_ptr, moved, list_queries, key_tiles, TILE=TILE,
            )  # fmt: skip
    tl.store(
        d_base + local[:, None] * stride_dn + dims[None, :],
        (acc * scaling).to(dq_ptr.dtype.element_ty),
        mask=tile_mask,
    )
    if ALPHA_GRADIENT:
        inverse = 1.0 / (alpha_head - 1.0)
        off = slope_gain / tl.where(slopes > 0, slopes, 1.0)
        dalpha = (gain - off * move) * inverse * inverse
        tl.store(dalpha_ptr + tau_rows, tl.where(tau < float("inf"), dalpha, 0.0), mask=row_mask)


def walk_queries(call, grad_out, tau, mean, lists, strays, by_keys, pairs, dquery, dalpha):
    """Fills dquery (B, H, N, D), pairs (B, H, N in whole tiles, 2): tau and delta, and dalpha (B, H, N) if not None.

    Into by_keys go p and ds of the strays.
    """
    query, key, value, config = call.query, call.key, call.value, call.configuration
    heads, queries, head_dim = query.shape[1:]
    keys = key.shape[2]
    walks = [(False, *walk) for walk in lists.walks()]
    if call.has_near:
        # Settled tiles have no mean, and so few keys that they are walked twice.
        walks.append((True, TILE, lists.tiles, lists.counts))
    for near, rows, tiles, counts in walks:
        stray_pointers, room = stray_arguments(None if near else strays, rows)
        launch = config.query_gradient if rows == TILE else config.query_gradient_pairs
        launch, columns = (config.near_gradient, config.near_columns) if near else (launch, config.inner)
        _query_gradient_kernel[(counts.numel(),)](
            query, key, value, call.descriptor(key, columns), call.descriptor(value, columns),
            call.alpha_tensor, call.slopes, call.visible, call.mask,
            tiles, counts, tau, mean, grad_out, pairs, dquery, dalpha, *stray_pointers[:3],
            by_keys.starts, by_keys.ends, by_keys.totals, by_keys.codes, by_keys.weights,
            call.excess, call.scaling,
            *stray_pointers[3:], by_keys.room,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mean.stride()[:3], *grad_out.stride()[:3],
            *dquery.stride()[:3],
            *call.visible_strides, *call.mask_strides,
            heads, queries, keys, counts.shape[2], call.query_tiles, call.key_tiles, head_dim,
            call.heads_at_once,
            **call.constants,
            DESCRIPTORS=call.descriptors,
            BLOCK_M=rows,
            BLOCK_N=columns,
            TILE=TILE,
            ALPHA_GRADIENT=dalpha is not None,
            TWO_WALKS=call.two_walks or near,
            NEAR=near,
            ROOM=room,
            STRAY_STAGES=config.stray_stages,
            num_warps=launch.warps,
            num_stages=launch.stages,
            **launch.limit(),
        )  # fmt: skip
