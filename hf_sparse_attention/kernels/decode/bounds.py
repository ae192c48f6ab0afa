"""Keys of every page of TILE -> its bounds: the minimum and maximum of every channel, and a small ball around them.

The ball's middle takes a byte a channel, a quarter of what the minimum and maximum take; its radius is that of the
keys around the middle as it is kept, so that all of them lie in it. Badoiu, Clarkson 2003, "Smaller core-sets for
balls": a middle that moves towards the farthest point, by less every time.
"""

import torch
import triton
import triton.language as tl

from ..configurations import TILE
from ..operators import _block_dim

# Numbers kept in float32 beside the codes of a page: their unit, a power of two; the largest distance of a key from
# the point they stand for, and that point's own length, both rounded up.
BALL = 3
# How often the middle, at first the mean, is moved. At noise 0.2 of the benchmark and 128 K keys 51 % of the pages are
# to be read with 0 moves, 41 with 4, 38 with 8, 36 with 12, 35 with 16, 33 with 32.
MOVES = 12


@triton.jit
def _power_of_two(x):
    """The smallest power of two that is at least x, of those with all digits, and its inverse; x below 2**126."""
    bits = tl.maximum((x.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000, 0x00800000)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["old_length", "new_length", "pages"])
def _update_kernel(
    k_ptr, lower_ptr, upper_ptr, codes_ptr, ball_ptr, length_ptr,
    stride_kb, stride_kg, stride_kn,
    stride_lb, stride_lg, stride_ln,
    stride_ub, stride_ug, stride_un,
    stride_cb, stride_cg, stride_cn,
    stride_rb, stride_rg, stride_rn,
    key_heads, old_length, new_length, pages, head_dim,
    HAS_LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOVES: tl.constexpr,
):  # fmt: skip
    head_index = tl.program_id(0)
    if HAS_LENGTH:
        # new_length is then how many keys were appended, and the tensor how many there are now.
        length = tl.load(length_ptr).to(tl.int32)
        page = (length - new_length) // TILE + tl.program_id(1)
    else:
        length = new_length
        page = old_length // TILE + tl.program_id(1)
    if ((page + 1) * TILE > length) | (page >= pages):
        return
    batch = (head_index // key_heads).to(tl.int64)
    group = (head_index % key_heads).to(tl.int64)
    rows = page * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < head_dim
    k_rows = k_ptr + batch * stride_kb + group * stride_kg + rows.to(tl.int64) * stride_kn
    k = tl.load(k_rows[:, None] + dims[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    # A key that is not a number makes the page's bounds so, and such a page is always read.
    broken = tl.max((k != k).to(tl.int32), 0) > 0
    lower = tl.where(broken, float("nan"), tl.min(k, 0))
    upper = tl.where(broken, float("nan"), tl.max(k, 0))
    place = batch * stride_lb + group * stride_lg + page.to(tl.int64) * stride_ln
    tl.store(lower_ptr + place + dims, lower.to(lower_ptr.dtype.element_ty), mask=inside)
    place = batch * stride_ub + group * stride_ug + page.to(tl.int64) * stride_un
    tl.store(upper_ptr + place + dims, upper.to(upper_ptr.dtype.element_ty), mask=inside)

    finite = tl.min((tl.abs(k) < float("inf")).to(tl.int32), 0)
    whole = tl.min(finite, 0) > 0
    k = tl.where(whole, k, 0.0)
    largest = tl.max(tl.maximum(tl.abs(tl.min(k, 0)), tl.abs(tl.max(k, 0))), 0)
    # Products with a power of two are exact: what rounding the codes takes away is in the distances, all of it.
    unit, inverse = _power_of_two(largest / 127)
    k = k * inverse
    middle = tl.sum(k, 0) / TILE
    codes, least = middle, float("inf")
    for move in range(MOVES + 1):
        away = k - middle[None, :]
        squares = tl.sum(away * away, 1)
        farthest = tl.max(squares, 0)
        codes = tl.where(farthest < least, middle, codes)
        least = tl.minimum(least, farthest)
        index = tl.argmax(squares, 0)
        middle += (tl.sum(tl.where((tl.arange(0, TILE) == index)[:, None], k, 0.0), 0) - middle) / (2 * move + 12)
    codes = tl.floor(codes + 0.5)
    place = batch * stride_cb + group * stride_cg + page.to(tl.int64) * stride_cn
    tl.store(codes_ptr + place + dims, codes.to(tl.int8), mask=inside)
    # Squares of the smallest numbers would vanish: distances are taken in units too.
    distance = k - codes[None, :]
    farthest = tl.max(tl.max(tl.abs(distance), 1), 0)
    farthest = tl.where(farthest > 0, farthest, 1.0)
    distance = distance / farthest
    radius = tl.sqrt(tl.max(tl.sum(distance * distance, 1), 0)) * farthest * unit * 1.0001
    size = tl.sqrt(tl.sum(codes * codes, 0)) * unit * 1.0001
    place = ball_ptr + batch * stride_rb + group * stride_rg + page.to(tl.int64) * stride_rn
    tl.store(place, unit)
    tl.store(place + 1, tl.where(whole, radius, float("nan")))
    tl.store(place + 2, size)


def update_bounds(key, lower, upper, codes, ball, length, old, new):
    """Bounds of the pages that became whole when the keys grew from `old` to `new`.

    With a length tensor it says how many keys there are now, and `new` how many of them were appended.
    """
    batch, key_heads, keys, head_dim = key.shape
    touched = new // TILE + 1 if length is not None else new // TILE - old // TILE
    if touched == 0:
        return
    with torch.cuda.device_of(key):
        _update_kernel[(batch * key_heads, touched)](
            key, lower, upper, codes, ball, length,
            *(stride for tensor in (key, lower, upper, codes, ball) for stride in tensor.stride()[:3]),
            key_heads, old, new, min(lower.shape[2], keys // TILE), head_dim,
            HAS_LENGTH=length is not None,
            TILE=TILE,
            BLOCK_D=_block_dim(head_dim),
            MOVES=MOVES,
            num_warps=4,
        )  # fmt: skip
