"""What every kernel does with one tile: which keys a row sees, the masked scores, the weights of a threshold.

Scores are kept as x = (alpha - 1) * (scaling * q.k - slope * distance), so that p = [x - tau]_+ ^ (1 / (alpha - 1)).
Legend: B batch, H query heads, G key heads, N queries, K keys, D head dimension.
"""

import torch
import triton
import triton.language as tl

# How a row's range of visible keys is known.
FULL, CAUSAL, RANGE = 0, 1, 2
# Which closed form the threshold has; the general ones take alpha at run time. For half precision the powers come from
# the special function units: BELOW_2 where 1 < alpha < 2 is known, PER_HEAD where alpha is a tensor.
GENERAL, BELOW_2, PER_HEAD, ENTMAX15, SPARSEMAX = 0, 1, 2, 15, 20
# Alpha 1, of few keys alone: x is the score / log 2, tau the logarithm to base 2 of the sum, p = u = 2^(x - tau).
SOFTMAX = 30

# Channels that a tensor core adds up where a score is to have all digits of float32.
CHANNELS = tl.constexpr(64)

# Whether PTX can be written: for a logarithm from the special function unit, where tl.log2 is 28 instructions.
HAS_PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit
def row_ranges(visible_ptr, stride_vn, rows, queries, keys, RANGE_KIND: tl.constexpr, PAIRS: tl.constexpr = False):
    """Half-open range of visible keys of every row; rows past the end see nothing. PAIRS loads both ends at once."""
    inside = rows < queries
    if RANGE_KIND == 0:
        start = tl.zeros_like(rows)
        end = tl.zeros_like(rows) + keys
    elif RANGE_KIND == 1:
        start = tl.zeros_like(rows)
        end = rows + (keys - queries + 1)
    else:
        if PAIRS:
            pointers = visible_ptr + rows.to(tl.int64)[:, None] * stride_vn + tl.arange(0, 2)[None, :]
            start, end = tl.split(tl.load(pointers, mask=inside[:, None], other=0))
        else:
            start = tl.load(visible_ptr + rows.to(tl.int64) * stride_vn, mask=inside, other=0)
            end = tl.load(visible_ptr + rows.to(tl.int64) * stride_vn + 1, mask=inside, other=0)
    start = tl.maximum(start, 0)
    end = tl.minimum(tl.maximum(end, 0), keys)
    return start, tl.where(inside, end, 0)


@triton.jit
def masked_scores(
    dots,
    factor,
    slope,
    columns,
    start,
    end,
    mask_ptrs,
    inside,
    MASKED: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Dot products -> x, with -inf where the row does not see the key. columns, start, end broadcast to the tile."""
    x = dots * factor
    if HAS_SLOPES:
        x += slope * (columns.to(tl.float32) - (end - 1).to(tl.float32))
    if MASKED:
        if RANGE_KIND == 2:
            # One unsigned comparison for start <= column < end: two are packed bit by bit into registers (NOTES.md).
            seen = (columns - start).to(tl.uint32) < tl.maximum(end - start, 0).to(tl.uint32)
            x = tl.where(seen, x, float("-inf"))
        else:
            x = tl.where(columns < end, x, float("-inf"))
    if HAS_MASK:
        x = tl.where(tl.load(mask_ptrs, mask=inside, other=0) != 0, x, float("-inf"))
    return x


@triton.jit
def logarithm(x, ALPHA_KIND: tl.constexpr):
    """To base 2, of numbers >= 0. The special function unit errs by 2^-22: absolutely near 1, relatively elsewhere."""
    if ALPHA_KIND == 1 or ALPHA_KIND == 2:
        if HAS_PTX:
            return tl.inline_asm_elementwise(
                "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            return tl.log2(x)
    else:
        return tl.log2(x)


@triton.jit
def on_support(u):
    """1 where u > 0, else 0, for u > 2^-100: one instruction, as multiplications can clamp their result to 0..1."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "mul.sat.f32 $0, $1, 0f71800000;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.where(u > 0, 1.0, 0.0)


@triton.jit
def ones_of(rounded):
    """1 where a number of half precision is above 0, else 0, in its dtype: one instruction for two."""
    if HAS_PTX:
        if rounded.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 zero; mov.b32 zero, 0; set.gt.bf16x2.bf16x2 $0, $1, zero; }",
                "=r,r", [rounded], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 zero; mov.b32 zero, 0; set.gt.f16x2.f16x2 $0, $1, zero; }",
                "=r,r", [rounded], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        return tl.where(rounded > 0, 1.0, 0.0).to(rounded.dtype)


@triton.jit
def power(excess, exponent, ALPHA_KIND: tl.constexpr):
    """excess ^ exponent where excess > 0, else 0; excess >= 0. BELOW_2 takes exponents > 0 only."""
    if ALPHA_KIND == 0:
        logarithms = logarithm(tl.where(excess > 0, excess, 1.0), ALPHA_KIND=ALPHA_KIND)
        return tl.where(excess > 0, tl.exp2(logarithms * exponent), 0.0)
    else:
        # The logarithm of 0 is -inf, which a positive exponent takes to 0.
        result = tl.exp2(logarithm(excess, ALPHA_KIND=ALPHA_KIND) * exponent)
        return result if ALPHA_KIND == 1 else tl.where(excess > 0, result, 0.0)


@triton.jit
def above(x, tau, CLAMPED: tl.constexpr):
    """[x - tau]_+, CLAMPED also to 1: as tau >= max x - 1 that is rounding only, and a fused multiply-add does it."""
    if not CLAMPED:
        return tl.maximum(x - tau, 0.0)
    elif HAS_PTX:
        return tl.inline_asm_elementwise(
            "cvt.sat.f32.f32 $0, $1;", "=f,f", [x - tau], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.minimum(tl.maximum(x - tau, 0.0), 1.0)


@triton.jit
def weights(x, tau, exponent, ALPHA_KIND: tl.constexpr, CLAMPED: tl.constexpr = False):
    """p = [x - tau]_+ ^ exponent and u = p^(2 - alpha) = [x - tau]_+ ^ (exponent - 1) on the support, else 0."""
    if ALPHA_KIND == 30:
        p = tl.exp2(x - tau)
        return p, p
    excess = above(x, tau, CLAMPED=CLAMPED)
    if ALPHA_KIND == 15:
        p = excess * excess
        u = excess
    elif ALPHA_KIND == 20:
        p = excess
        u = tl.where(excess > 0, 1.0, 0.0)
    else:
        u = power(excess, exponent - 1, ALPHA_KIND=ALPHA_KIND)
        p = u * excess
    return p, u


@triton.jit
def alpha_slopes(p, u, excess, ALPHA_KIND: tl.constexpr):
    """(alpha-1)^2 dp/dalpha without the threshold's own movement: p - u + p y, y = -(alpha-1) log p; excess alpha - 1.

    Near y = 0 that is what is left of three numbers which cancel: there the series of -p (exp(y) - 1 - y).
    """
    y = (-0.6931471805599453 * excess) * logarithm(tl.maximum(p, 1e-37), ALPHA_KIND=ALPHA_KIND)
    series = 1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040 + y * (1 / 40320))))
    series = p * y * y * (0.5 + y * (1 / 6 + y * series))
    return -tl.where(y < 0.5, series, u - p - p * y)


@triton.jit
def weights_and_curvature(x, tau, exponent, ALPHA_KIND: tl.constexpr, CLAMPED: tl.constexpr = False):
    """p and u as `weights` gives them and w = [x - tau]_+ ^ (exponent - 2) on the support, else 0."""
    if ALPHA_KIND == 15:
        p, u = weights(x, tau, exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
        w = on_support(u)
    elif ALPHA_KIND == 20:
        p, u = weights(x, tau, exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED)
        w = tl.zeros_like(u)
    else:
        excess = above(x, tau, CLAMPED=CLAMPED)
        # This exponent may be negative or 0.
        w = power(excess, exponent - 2, ALPHA_KIND=2 if ALPHA_KIND == 1 else ALPHA_KIND)
        u = w * excess
        p = u * excess
    return p, u, w


@triton.jit
def entmax_parameters(alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA: tl.constexpr, HAS_SLOPES: tl.constexpr):
    """alpha of this head, 1/(alpha-1), the factor of the products, the slope in units of x; excess is alpha - 1."""
    excess_head = tl.load(alpha_ptr + head).to(tl.float32) - 1.0 if HAS_ALPHA else excess
    slope = 0.0
    if HAS_SLOPES:
        slope = excess_head * tl.load(slopes_ptr + head).to(tl.float32)
    return excess_head + 1.0, 1.0 / excess_head, excess_head * scaling, slope


@triton.jit
def share_of(program, programs, tiles, at_once):
    """(head, place) of a program: `at_once` heads at a time, of all of these their first tiles first.

    Programs of one launch differ in length, under a causal mask as 1 to `tiles`, and start in their order: with the
    longest of every head in front none of these is alone at the end.
    """
    heads = programs // tiles
    first = program // (at_once * tiles) * at_once
    size = tl.minimum(at_once, heads - first)
    inside = program - first * tiles
    return first + inside % size, inside // size


@triton.jit
def listed_start(lists, index, TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """First position of the index-th piece of BLOCK_N of the listed tiles."""
    PIECES: tl.constexpr = TILE // BLOCK_N
    if PIECES == 1:
        return tl.load(lists + index).to(tl.int32) * TILE
    else:
        return tl.load(lists + index // PIECES).to(tl.int32) * TILE + (index % PIECES) * BLOCK_N


@triton.jit
def load_block(
    source,
    batch,
    head,
    first,
    stride,
    dims,
    length,
    head_dim,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows first..first+BLOCK of one head, zeros past the end; source is a descriptor or the head's first element."""
    if DESCRIPTORS:
        return tl.reshape(source.load([batch, head, first, 0]), (BLOCK, BLOCK_D))
    else:
        rows = first + tl.arange(0, BLOCK)
        pointers = source + rows.to(tl.int64)[:, None] * stride + dims[None, :]
        if MASKED:
            return tl.load(pointers, mask=(rows < length)[:, None] & (dims < head_dim)[None, :], other=0.0)
        elif EVEN_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dims < head_dim)[None, :], other=0.0)


@triton.jit
def rounded_sum(x, y):
    """x + y, each rounded to nearest. Written out: a product that is only added would go on with that sum instead."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x + y


@triton.jit
def products(q, k, PRECISION: tl.constexpr, FIRST: tl.constexpr = False):
    """q k^T (M, N) of q (M, D) and k (N, D). Three tf32 products to the last digits of float32.

    A tensor core cuts off, always towards zero, what a partial sum has no digits for. So there sums of CHANNELS
    channels are added as a processor does, rounded. The other channels are zeros, which cost time only: of k, or of q
    (FIRST), whichever is another one at every turn, as the parts of what stays would all lie in shared memory.
    """
    if PRECISION == "tf32x3" and q.shape[1] > CHANNELS:
        channels = tl.arange(0, q.shape[1])[None, :] // CHANNELS
        x = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
        for part in tl.static_range(q.shape[1] // CHANNELS):
            some_q = tl.where(channels == part, q, 0.0) if FIRST else q
            some_k = k if FIRST else tl.where(channels == part, k, 0.0)
            x = rounded_sum(x, tl.dot(some_q, tl.trans(some_k), input_precision=PRECISION))
        return x
    else:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def key_scores(
    q,
    k,
    first,
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
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x of a block of queries and the keys from first on, -inf where the query does not see the key."""
    columns = first + tl.arange(0, BLOCK_N)
    mask_ptrs = mask_base
    inside = True
    if HAS_MASK:
        mask_ptrs = mask_base + rows.to(tl.int64)[:, None] * stride_mn + columns.to(tl.int64)[None, :] * stride_mk
        inside = (rows < queries)[:, None] & (columns < keys)[None, :]
    return masked_scores(
        products(q, k, PRECISION=PRECISION),
        factor,
        slope,
        columns[None, :],
        start[:, None],
        end[:, None],
        mask_ptrs,
        inside,
        MASKED=MASKED,
        RANGE_KIND=RANGE_KIND,
        HAS_SLOPES=HAS_SLOPES,
        HAS_MASK=HAS_MASK,
    )


@triton.jit
def whole_tiles(count, RANGE_KIND: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr):
    """How many tiles at the head of an ascending list every row sees whole: all but those a row's end can cut."""
    if RANGE_KIND == 0:
        return tl.maximum(count - 1, 0)
    elif RANGE_KIND == 1:
        return tl.maximum(count - BLOCK_M // TILE - 1, 0)
    else:
        return count * 0


@triton.jit
def whole_span(lists, count, start, end, keys, RANGE_KIND: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr):
    """Where in an ascending list the tiles begin and end that every row sees whole; rows that see nothing are free."""
    if RANGE_KIND == 2:
        sees = start < end
        low = tl.cdiv(tl.max(tl.where(sees, start, 0), 0), TILE)
        high = tl.maximum(tl.min(tl.where(sees, end, keys), 0) // TILE, low)
        scan = tl.arange(0, 128)
        # How many listed tiles lie below either end, both in one sum.
        below = 0
        for base in range(0, count, 128):
            tiles = tl.load(lists + base + scan, mask=base + scan < count, other=32767).to(tl.int32)
            below += tl.sum((tiles < low).to(tl.int32) + (tiles < high).to(tl.int32) * 65536, 0)
        return below % 65536, below // 65536
    else:
        return count * 0, whole_tiles(count, RANGE_KIND=RANGE_KIND, BLOCK_M=BLOCK_M, TILE=TILE)
