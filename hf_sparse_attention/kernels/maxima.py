"""Blocks of keys -> per row the maximum of every tile and of 64 interleaved classes of keys, and what follows of them:
how far a bias lets a row reach, and a lower bound of its tau.
"""

import torch
import triton
import triton.language as tl

from .tiles import masked_scores, weights


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


@triton.jit
def farthest_reached(q, slots, key_length, factor, slope, inside, end, keys):
    """The first key that some row can give weight to, from what it has seen: no key farther comes within 1 of that."""
    nearest = tl.max(slots, 1)
    length = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
    upper = factor * length * key_length
    reach = (upper * 1.001 + 1.0 - nearest) / tl.maximum(slope, 1e-30) + 2.0
    # A row without a key so far has an unknown maximum: everything stays in reach.
    reach = tl.where((nearest > float("-inf")) & (reach < 1e9), reach, 1e9)
    return tl.min(tl.where(inside, end - 1 - reach.to(tl.int32), keys), 0)


@triton.jit
def class_bound(
    slots, inside, alpha, exponent, STEPS: tl.constexpr, ALPHA_KIND: tl.constexpr, CLAMPED: tl.constexpr
):  # fmt: skip
    """A lower bound of tau from the maxima of classes of keys, 1e30 for rows that see none, and which those are."""
    # Newton steps from the left on the e-norm of [slots - tau]_+, which is convex for alpha <= 2: never past tau.
    greatest = tl.max(slots, 1)
    empty = (greatest == float("-inf")) | (inside == 0)
    tau = tl.where(empty, 1e30, greatest - 1.0)
    convex = alpha <= 2.0
    if convex:
        for _ in range(STEPS):
            p, u = weights(slots, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
            total_weight = tl.sum(p, 1)
            slope_sum = tl.sum(u, 1)
            if ALPHA_KIND == 15:
                norm_power = tl.sqrt(total_weight)
            elif ALPHA_KIND == 20:
                norm_power = tl.zeros_like(total_weight) + 1.0
            else:
                norm_power = tl.exp2(tl.log2(tl.maximum(total_weight, 1.0)) * (1.0 - 1.0 / exponent))
            step = (total_weight - norm_power) / tl.maximum(slope_sum, 1e-30)
            tau += tl.where(empty, 0.0, tl.maximum(step, 0.0))
    # Rounding of the steps must not lift the bound above tau.
    tau -= tl.where(empty, 0.0, 1e-6 * tl.abs(tau) + 1e-6)
    if CLAMPED:
        # No weight exceeds 1, which the passes that follow take for granted.
        tau = tl.where(empty, tau, tl.maximum(tau, greatest - 1.0))
    return tau, empty


def longest_keys(key):
    """(B, G, K, D) -> lengths (B, G) of the longest keys, as `farthest_reached` takes them."""
    return torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).amax(-1)
