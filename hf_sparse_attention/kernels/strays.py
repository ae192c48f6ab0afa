"""Strays: the (query, key) pairs outside the listed tiles that can hold weight.

A block of strays is a tile whose columns are keys from anywhere, each seen by one row: the passes over the tiles take
them as such. Enters: what `gather` collected. Leaves: weights of a block, rows of keys, the strays by tile of keys.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from .configurations import TILE
from .tiles import weights, weights_and_curvature

# What the map of the lists says of a tile whose pairs are strays.
APART = tl.constexpr(4)
# The bit of a code from which on it says the row; below is the key.
ROW_BIT = tl.constexpr(21)


@dataclass(frozen=True)
class Strays:
    """(query, key) pairs that can hold weight outside the listed tiles, per TILE queries, by tile.

    pool (B, H, N, 2 * room) int32: codes and, as float32, scores, their x. The rows of a tile of queries are one array
    that is filled from its start; counts (B, H, N/TILE) int32 says how far: 0 where two are walked together. tile_map
    (B, H, K/TILE, N/TILE) int32, where a backward follows: 256 times the place of the first stray of a tile of keys
    plus their number, where the lists' map says APART. out: the output, where its memory is the pool.
    """

    pool: torch.Tensor
    counts: torch.Tensor
    tile_map: torch.Tensor | None
    out: torch.Tensor | None = None

    @property
    def room(self):
        """Strays per query that there is room for."""
        return self.pool.shape[-1] // 2

    @cached_property
    def codes(self):
        """(B, H, N, room) int32: the key and, from bit ROW_BIT on, the row within the tile."""
        return self.pool[..., : self.room]

    @cached_property
    def scores(self):
        """(B, H, N, room) float32, with the strides of the codes."""
        return self.pool[..., self.room : 2 * self.room].view(torch.float32)


def stray_arguments(strays, rows):
    """Pointers, strides and room as the kernels take them; a room of 0 says that so many rows together have none."""
    if strays is None or rows > TILE:
        return (None, None, None, 0, 0, 0), 0
    return (strays.codes, strays.scores, strays.counts, *strays.codes.stride()[:3]), strays.room


@triton.jit
def stray_places(stride, entries, ROOM: tl.constexpr):
    """Where the strays of a block of rows are, counted from the block's first element of the codes or scores."""
    # Unsigned, a division is a shift.
    entries = entries.to(tl.uint32)
    return ((entries // ROOM) * stride + entries % ROOM).to(tl.int32)


@triton.jit
def stray_codes(code_ptr, offset, stride, index, count, ROOM: tl.constexpr, BLOCK_N: tl.constexpr):
    """The index-th BLOCK_N strays: where they are, whether they exist, their rows and keys."""
    entries = index * BLOCK_N + tl.arange(0, BLOCK_N)
    held = entries < count
    places = stray_places(stride, entries, ROOM=ROOM)
    codes = tl.load(code_ptr + offset + places, mask=held, other=0)
    own = codes >> ROW_BIT
    return entries, places, held, own, codes ^ (own << ROW_BIT)


@triton.jit
def stray_weights(
    code_ptr, score_ptr, offset, stride, index, count, local, tau, point_ptr, exponent,
    ALPHA_KIND: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POINTS: tl.constexpr,
    CURVED: tl.constexpr = False,
):  # fmt: skip
    """p and u of a block of rows and the index-th BLOCK_N strays, 0 but in a stray's row; entries, held, rows, keys.

    tau: the rows' thresholds; they also stand at point_ptr, POINTS apart. CURVED: p, u, w and the rest.
    """
    entries, places, held, own, keys = stray_codes(code_ptr, offset, stride, index, count, ROOM=ROOM, BLOCK_N=BLOCK_N)
    scores = tl.load(score_ptr + offset + places, mask=held, other=float("-inf"))
    # A row's number in signs times that of a stray's row is 7 where they are equal: as it is a product like that of a
    # tile, the compiler spreads it over the threads like a tile. A comparison would be spread otherwise and spill.
    bit = tl.arange(0, 16)
    signs = tl.where((bit < 7)[None, :], 1 - 2 * ((local[:, None] >> bit[None, :]) & 1), 0)
    own_signs = tl.where((bit < 7)[:, None] & held[None, :], 1 - 2 * ((own[None, :] >> bit[:, None]) & 1), 0)
    mine = tl.dot(signs.to(tl.float16), own_signs.to(tl.float16)) > 6.5
    if ALPHA_KIND < 15:
        # Logarithm and exponential once per stray, not once per place of the block.
        points = tl.load(point_ptr + own * POINTS, mask=held, other=0.0)
        if CURVED:
            stray_p, stray_u, stray_w = weights_and_curvature(scores, points, exponent, ALPHA_KIND=ALPHA_KIND)
            w = tl.where(mine, stray_w[None, :], 0.0)
        else:
            stray_p, stray_u = weights(scores, points, exponent, ALPHA_KIND=ALPHA_KIND)
        p = tl.where(mine, stray_p[None, :], 0.0)
        u = tl.where(mine, stray_u[None, :], 0.0)
    else:
        x = tl.where(mine, scores[None, :], float("-inf"))
        if CURVED:
            p, u, w = weights_and_curvature(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
        else:
            p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
    if CURVED:
        return p, u, w, entries, held, own, keys
    else:
        return p, u, entries, held, own, keys


@triton.jit
def gather_rows(pointers, held, dims, head_dim, EVEN_D: tl.constexpr):
    """Rows from anywhere, given a pointer to the first element of each; zeros where none is held."""
    if EVEN_D:
        return tl.load(pointers[:, None] + dims[None, :], mask=held[:, None], other=0.0)
    else:
        return tl.load(pointers[:, None] + dims[None, :], mask=held[:, None] & (dims < head_dim)[None, :], other=0.0)


@triton.jit
def move_strays(
    p, ds, entries, held, keys, member_rows, head_index, group_index, first_tile,
    start_ptr, end_ptr, total_ptr, code_ptr, moved_ptr, moved, query_tiles, key_tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """p and ds of a block of strays, each alone in its column, go to their tiles of keys, ordered by queries.

    member_rows: their queries, counted through the heads of the group; first_tile: the block's first tile of queries.
    """
    tiles = keys // TILE
    cells = (head_index.to(tl.int64) * key_tiles + tiles) * query_tiles + first_tile
    segments = group_index.to(tl.int64) * key_tiles + tiles
    places = tl.load(end_ptr + segments, mask=held, other=0) - tl.load(total_ptr + segments, mask=held, other=0)
    places += tl.load(start_ptr + cells, mask=held, other=0) + entries
    tl.store(code_ptr + places, member_rows * TILE + keys % TILE, mask=held)
    tl.store(moved_ptr + places, tl.sum(p, 0).to(moved_ptr.dtype.element_ty), mask=held)
    tl.store(moved_ptr + moved + places, tl.sum(ds, 0).to(moved_ptr.dtype.element_ty), mask=held)


@triton.jit
def add_strays(
    dk, dv, segment, end_ptr, total_ptr, code_ptr, moved_ptr, moved,
    q_base, do_base, stride_qh, stride_qn, stride_gh, stride_gn, queries, local, dims, head_dim,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys with what the strays that `move_strays` has put there add to them."""
    total = tl.load(total_ptr + segment)
    begin = tl.load(end_ptr + segment) - total
    pieces = tl.arange(0, BLOCK_N)
    for index in tl.range(0, tl.cdiv(total, BLOCK_N), num_stages=STAGES):
        entries = index * BLOCK_N + pieces
        held = entries < total
        codes = tl.load(code_ptr + begin + entries, mask=held, other=0)
        p = tl.load(moved_ptr + begin + entries, mask=held, other=0.0)
        ds = tl.load(moved_ptr + moved + begin + entries, mask=held, other=0.0)
        heads = (codes // TILE // queries).to(tl.int64)
        rows = (codes // TILE % queries).to(tl.int64)
        q = gather_rows(q_base + heads * stride_qh + rows * stride_qn, held, dims, head_dim, EVEN_D=EVEN_D)
        do = gather_rows(do_base + heads * stride_gh + rows * stride_gn, held, dims, head_dim, EVEN_D=EVEN_D)
        own = (codes % TILE)[None, :] == local[:, None]
        dv = tl.dot(tl.where(own, p[None, :], 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(tl.where(own, ds[None, :], 0.0).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
