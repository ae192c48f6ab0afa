"""query, key, value, tau and the listed tiles -> output and, for the backward, the mean of the values under u.

The pass measures what the refinement has left of tau and corrects the output for it: with the mean to first order, as
d p / d tau is -exponent u; where nobody else needs the mean by dividing by the sum of p.
"""

import torch
import triton
import triton.language as tl

from .compiling import Kernel
from .configurations import TILE
from .edges import edge_scores, lane_sums, seen_by_all, turn_start, turns
from .strays import gather_rows, stray_arguments, stray_weights
from .tiles import entmax_parameters, load_block, on_support, ones_of, row_ranges, share_of, weights


@triton.jit
def last_step(sums, slope_sum, count, exponent, alpha, ALPHA_KIND: tl.constexpr):
    """What is missing to the threshold at a point whose support is the true one or very near it."""
    positive = slope_sum > 0
    divisor = tl.where(positive, slope_sum, 1.0)
    if ALPHA_KIND == 15:
        discriminant = tl.maximum(slope_sum * slope_sum - count * (sums - 1.0), 0.0)
        step = (sums - 1.0) / (divisor + tl.sqrt(discriminant))
    else:
        # With the second order of a sum of p that is the power 2 e of a line, between the power e and an exponential.
        step = (sums - 1.0) * (1.0 + (0.5 - 0.25 / exponent) * (sums - 1.0)) / (exponent * divisor)
        if ALPHA_KIND == 0 or ALPHA_KIND == 2:
            # Above alpha = 2 every u is at least 1. One key alone stands 1 above the threshold, and p / u is how far
            # it does: its slope 1 / (alpha - 1) would multiply the rounding of p.
            above = tl.where(slope_sum < 1.5, sums / divisor - 1.0, step)
            # No key is nearer to the threshold than this. The step must be shorter than its way, where slopes grow
            # without bound, or else it is only right next to the end of the bracket.
            nearest = tl.exp2(tl.log2(divisor) / tl.minimum(exponent - 1.0, -1e-3))
            right = (tl.abs(above) < 0.25 * nearest) | (tl.abs(sums - 1.0) < 1e-6)
            step = tl.where(alpha > 2.0, tl.where(right, above, 0.0), step)
    return tl.where(positive, step, 0.0)


@Kernel
@triton.jit(
    do_not_specialize=["queries", "keys", "query_tiles", "list_queries", "key_tiles", "at_once", "excess", "scaling"]
)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr,
    list_ptr, count_ptr, point_ptr, tau_ptr, out_ptr, mean_ptr, code_ptr, score_ptr, stray_count_ptr,
    excess, scaling,
    stride_sb, stride_sh, stride_sn,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_ob, stride_oh, stride_on,
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
    SAVE: tl.constexpr,
    MEAN: tl.constexpr,
    ROOM: tl.constexpr,
    STRAY_STAGES: tl.constexpr,
):  # fmt: skip
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

    tau = tl.load(point_ptr + tau_rows, mask=row_mask, other=1e30)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc_mean = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    slope_sum = tl.zeros((BLOCK_M,), tl.float32)
    # The sum of what the second product sees, so that near-equal weights which all round to one side cancel. In half
    # precision it is a product as well: to round and then to add one by one takes a third of the loop.
    HALF: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    parts = tl.zeros((BLOCK_M, 4), tl.float32)
    signs = tl.zeros((BLOCK_M, 4), tl.int32)
    acc_support = tl.zeros((BLOCK_M, 8), tl.float32)
    ones = tl.full((BLOCK_N, 8), 1.0, q_ptr.dtype.element_ty)
    # An alpha that learns has a gradient in float32: its tau is as exact.
    CLAMPED: tl.constexpr = HALF and ALPHA_KIND != 0
    PRECISE: tl.constexpr = HALF and (not MEAN or (SAVE and ALPHA_KIND == 2))
    slope_parts = tl.zeros((BLOCK_M, 4), tl.float32)
    acc_slope = tl.zeros((BLOCK_M, 8), tl.float32)
    seen_start, seen_end = seen_by_all(start, end, keys)
    pieces = count * (TILE // BLOCK_N)
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
            FUSED=HALF and (ALPHA_KIND >= 15 or ALPHA_KIND == 1),
        )  # fmt: skip
        p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
        parts += lane_sums(p)
        rounded = u.to(q.dtype)
        if PRECISE:
            slope_parts += lane_sums(u)
        if ALPHA_KIND == 15 and HALF:
            acc_support = tl.dot(ones_of(rounded if MEAN else p.to(q.dtype)), ones, acc_support)
        elif ALPHA_KIND == 15:
            # A sign is one instruction, a comparison and a sum of its ones are three.
            signs += lane_sums((x - tau[:, None]).to(tl.int32, bitcast=True) >> 31)
        v = load_block(
            v_source, batch, head // GROUP, first, stride_wn, dims, keys, head_dim,
            BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if MEAN:
            acc_mean = tl.dot(rounded, v, acc_mean, input_precision=PRECISION)
            if HALF:
                acc_slope = tl.dot(rounded, ones, acc_slope)
            else:
                slope_sum += tl.sum(u, 1)
    sums = tl.sum(parts, 1)
    support = tl.max(acc_support, 1) if HALF else (tl.sum(signs, 1) + turns(pieces) * BLOCK_N).to(tl.float32)
    if ROOM > 0:
        w_base = v_ptr + batch.to(tl.int64) * stride_wb + (head // GROUP).to(tl.int64) * stride_wg
        for index in tl.range(0, tl.cdiv(strays, BLOCK_N), num_stages=STRAY_STAGES):
            p, u, entries, held, own, chosen = stray_weights(
                code_ptr, score_ptr, stray_offset, stride_sn, index, strays, local, tau, point_ptr + tau_row, exponent,
                ALPHA_KIND=ALPHA_KIND, ROOM=ROOM, BLOCK_N=BLOCK_N, POINTS=1,
            )  # fmt: skip
            sums += tl.sum(p, 1)
            rounded = u.to(q.dtype)
            if PRECISE:
                slope_parts += lane_sums(u)
            if ALPHA_KIND == 15:
                support += tl.sum(on_support(u), 1)
            v = gather_rows(w_base + chosen.to(tl.int64) * stride_wn, held, dims, head_dim, EVEN_D=EVEN_D)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            if MEAN:
                acc_mean = tl.dot(rounded, v, acc_mean, input_precision=PRECISION)
                if HALF:
                    acc_slope = tl.dot(rounded, ones, acc_slope)
                else:
                    slope_sum += tl.sum(u, 1)
        # The strays may lie where the output goes.
        tl.debug_barrier()

    if HALF:
        # The columns are the same.
        slope_sum = tl.max(acc_slope, 1)
    empty = tau >= 1e30
    steepness = tl.sum(slope_parts, 1) if PRECISE else slope_sum
    correction = last_step(sums, steepness, support, exponent, alpha_head, ALPHA_KIND=ALPHA_KIND)
    if MEAN:
        # Weights lose their share in u of what the sum of p is too much: then it is 1.
        share = tl.where(correction == 0.0, 0.0, (sums - 1.0) / tl.where(slope_sum > 0, slope_sum, 1.0))
        acc -= share[:, None] * acc_mean
    else:
        # What the sum of p is too much is taken from the weights in proportion, not from u: that errs by the product
        # of what it is too much and how far the mean under u is from the output.
        acc /= tl.where(sums > 0, sums, 1.0)[:, None]
    tau = tl.where(empty, float("inf"), tau + correction)
    tl.store(tau_ptr + tau_rows, tau, mask=row_mask)
    o_offsets = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    o_offsets = o_offsets + row_tile.to(tl.int64) * BLOCK_M * stride_on + local[:, None] * stride_on + dims[None, :]
    o_mask = row_mask[:, None] & dim_mask
    tl.store(out_ptr + o_offsets, acc.to(out_ptr.dtype.element_ty), mask=o_mask)
    if SAVE:
        acc_mean /= tl.where(slope_sum > 0, slope_sum, 1.0)[:, None]
        tl.store(mean_ptr + o_offsets, acc_mean.to(mean_ptr.dtype.element_ty), mask=o_mask)


def attend(call, point, lists, save, strays=None, near=None):
    """Output (B, H, N, D), laid out (B, N, H, D), tau (B, H, N), and for a backward the mean of the values under u.

    near: the tiles that are settled already, of which there is no mean.
    """
    query, key, value, config = call.query, call.key, call.value, call.configuration
    batch, heads, queries, head_dim = query.shape
    if near is not None:
        out, tau = near.out, near.tau
    else:
        out, tau = None if strays is None else strays.out, torch.empty_like(point)
    if out is None:
        out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=query.device).transpose(1, 2)
    # In float32 whatever the input: the backward subtracts its product from another.
    mean = torch.empty_like(out, dtype=torch.float32) if save else None
    means = call.sums_means(save)
    for rows, tiles, counts in lists.walks():
        stray_pointers, room = stray_arguments(strays, rows)
        if means:
            launch = config.forward if rows == TILE else config.forward_pairs
        else:
            launch = config.output if rows == TILE else config.output_pairs
        _forward_kernel[(counts.numel(),)](
            query, key, value, call.descriptor(key), call.descriptor(value),
            call.alpha_tensor, call.slopes, call.visible, call.mask,
            tiles, counts, point, tau, out, mean, *stray_pointers[:3],
            call.excess, call.scaling,
            *stray_pointers[3:],
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            *call.visible_strides, *call.mask_strides,
            heads, queries, key.shape[2], counts.shape[2], call.query_tiles, call.key_tiles, head_dim,
            call.heads_at_once,
            **call.constants,
            DESCRIPTORS=call.descriptors,
            BLOCK_M=rows,
            BLOCK_N=config.inner,
            TILE=TILE,
            SAVE=save,
            MEAN=means,
            ROOM=room,
            STRAY_STAGES=config.stray_stages,
            num_warps=launch.warps,
            num_stages=launch.stages,
            **launch.limit(),
        )  # fmt: skip
    return out, tau, mean
