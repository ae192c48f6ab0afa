"""Blocks of keys -> per row the maximum of every tile and of 64 interleaved classes of keys."""

import triton
import triton.language as tl

from .tiles import masked_scores


@triton.jit
def visit_keys(
    first,
    last,
    gap_first,
    gap_last,
    q,
    slots,
    k_source,
    batch,
    group,
    stride_kn,
    dims,
    head_dim,
    scratch_ptr,
    local_rows,
    rows,
    queries,
    keys,
    start,
    end,
    factor,
    slope,
    mask_base,
    stride_mn,
    stride_mk,
    MASKED: tl.constexpr,
    HAS_GAP: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Blocks first..last of keys: the row maxima of their tiles go to the scratch, the classes are updated.

    HAS_GAP leaves out the blocks gap_first..gap_last.
    """
    PIECES: tl.constexpr = BLOCK_N // TILE
    local_columns = tl.arange(0, BLOCK_N)
    pieces = tl.arange(0, PIECES)
    if HAS_GAP:
        last -= gap_last - gap_first
    for index in range(first, last):
        block = index
        if HAS_GAP:
            block += tl.where(index < gap_first, 0, gap_last - gap_first)
        columns = block * BLOCK_N + local_columns
        if DESCRIPTORS:
            k = tl.reshape(k_source.load([batch, group, block * BLOCK_N, 0]), (BLOCK_N, BLOCK_D))
        else:
            k_ptrs = k_source + columns.to(tl.int64)[:, None] * stride_kn + dims[None, :]
            if MASKED or HAS_MASK:
                k_mask = (columns < keys)[:, None]
                if not EVEN_D:
                    k_mask = k_mask & (dims < head_dim)[None, :]
                k = tl.load(k_ptrs, mask=k_mask, other=0.0)
            elif EVEN_D:
                k = tl.load(k_ptrs)
            else:
                k = tl.load(k_ptrs, mask=(dims < head_dim)[None, :], other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED or HAS_SLOPES or HAS_MASK:
            mask_ptrs = mask_base
            inside = True
            if HAS_MASK:
                mask_ptrs = mask_base + rows.to(tl.int64)[:, None] * stride_mn
                mask_ptrs += columns.to(tl.int64)[None, :] * stride_mk
                inside = (rows < queries)[:, None] & (columns < keys)[None, :]
            # Without a bias the factor waits: it is positive, so a maximum can be scaled afterwards.
            x = masked_scores(
                x, factor if HAS_SLOPES else 1.0, slope, columns[None, :], start[:, None], end[:, None],
                mask_ptrs, inside,
                MASKED=MASKED, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
            )  # fmt: skip
        if PIECES == 1:
            slots = tl.maximum(slots, x)
            tl.store(scratch_ptr + block * BLOCK_M + local_rows, tl.max(x, 1))
        else:
            x = tl.reshape(x, (BLOCK_M, PIECES, TILE))
            slots = tl.maximum(slots, tl.max(x, 1))
            tl.store(scratch_ptr + (block * PIECES + pieces)[None, :] * BLOCK_M + local_rows[:, None], tl.max(x, 2))
    return slots
