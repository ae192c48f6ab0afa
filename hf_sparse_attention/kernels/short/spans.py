"""Rows and keys -> the keys that a block of rows sees, and their loads."""

import triton
import triton.language as tl


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
