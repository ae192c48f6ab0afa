"""Tiles of queries whose slope leaves few keys in reach -> output, tau and list, in one program each.

There every other pass costs what a program does beside its keys. Enters: query, key, value, slopes. Leaves: the tiles
that are settled and a queue of those that are not, for the passes that follow.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .compiling import Kernel
from .configurations import TILE
from .edges import edge_scores, lane_sums, seen_by_all, turn_start, turns
from .forward import last_step
from .maxima import class_bound, farthest_reached, longest_keys
from .tiles import BELOW_2, ENTMAX15, SPARSEMAX, entmax_parameters, load_block, on_support, row_ranges, weights

# Newton steps on the classes.
STEPS = 5
# How much the sum of p may be off where a tile is settled: a quarter of the rounding of the output.
TOLERANCES = {torch.bfloat16: 1e-3, torch.float16: 1.2e-4}


@dataclass(frozen=True)
class Near:
    """What is settled of a call, in tensors of the whole call.

    out (B, H, N, D), tau (B, H, N); tiles, counts and tile_map as in `Lists`, counts `settled` where a tile is;
    stray_counts as in `Sparse`; lengths (B, G) of the longest keys. queue: numbers of the blocks of queries, as the
    dense pass takes them, in which some tile is not settled, in any order; queued[2] says how many, before it are two
    counters of the dense pass.
    """

    out: torch.Tensor
    tau: torch.Tensor
    tiles: torch.Tensor
    counts: torch.Tensor
    stray_counts: torch.Tensor | None
    tile_map: torch.Tensor | None
    lengths: torch.Tensor
    queue: torch.Tensor
    queued: torch.Tensor


@triton.jit
def settled(count):
    """The length of a list -> what is written where the tile is settled, and back: others pass by what is negative."""
    return -2 - count


@triton.jit
def _visit(
    first_tile, last_tile, high, slots, maxima, q, k_source, batch, group, stride_kn, dims, head_dim,
    rows, queries, keys, start, end, seen_start, seen_end, factor, slope, mask_base, stride_mn, stride_mk,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles first_tile..last_tile: the maxima of 64 classes of keys, and of every tile, counted back from high."""
    back = tl.arange(0, SPAN)
    for tile in range(first_tile, last_tile):
        k = load_block(
            k_source, batch, group, tile * TILE, stride_kn, dims, keys, head_dim,
            BLOCK=TILE, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip
        x = edge_scores(
            q, k, tile * TILE, rows, queries, keys, start, end, seen_start, seen_end, factor, slope,
            mask_base, stride_mn, stride_mk,
            BLOCK_N=TILE, RANGE_KIND=RANGE_KIND, HAS_SLOPES=True, HAS_MASK=HAS_MASK, PRECISION=PRECISION, FUSED=True,
        )  # fmt: skip
        slots = tl.maximum(slots, x)
        maxima = tl.where((back == high - 1 - tile)[None, :], tl.max(x, 1)[:, None], maxima)
    return slots, maxima


@triton.jit
def _enqueue(queue_ptr, queued_ptr, item):
    # The order hangs on who comes first; nothing that is computed hangs on the order.
    tl.store(queue_ptr + tl.atomic_add(queued_ptr + 2, 1), item)


@Kernel
@triton.jit(do_not_specialize=["queries", "keys", "query_tiles", "key_tiles", "blocks", "excess", "scaling"])
def _near_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, length_ptr,
    list_ptr, count_ptr, stray_count_ptr, map_ptr, tau_ptr, out_ptr, queue_ptr, queued_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_wb, stride_wg, stride_wn,
    stride_ob, stride_oh, stride_on,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, query_tiles, key_tiles, blocks, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head_index = program // query_tiles
    row_tile = query_tiles - 1 - program % query_tiles
    list_row = head_index.to(tl.int64) * query_tiles + row_tile
    batch = head_index // heads
    head = head_index % heads
    local = tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_D)
    rows = row_tile * TILE + local
    alpha_head, exponent, factor, slope = entmax_parameters(
        alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
    )
    asked_ptr = queued_ptr + 3
    key_length = tl.load(length_ptr + batch * (heads // GROUP) + head // GROUP)
    block = head_index * blocks + row_tile // BLOCK_TILES
    # No bias that grows by less than this from end to end of the tiles that may be in reach keeps any key out of it.
    if not slope * (SPAN * TILE) > 1.0:
        if row_tile % BLOCK_TILES == 0:
            _enqueue(queue_ptr, queued_ptr, block)
        return
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_base += row_tile.to(tl.int64) * TILE * stride_qn
    row_mask = rows < queries
    tile_mask = row_mask[:, None] & (dims < head_dim)[None, :]
    q = tl.load(q_base + local[:, None] * stride_qn + dims[None, :], mask=tile_mask, other=0.0)
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
    inside = row_mask & (start < end)
    seen_start, seen_end = seen_by_all(start, end, keys)
    low = tl.min(tl.where(inside, start, keys), 0) // TILE
    high = tl.cdiv(tl.max(tl.where(inside, end, 0), 0), TILE)
    low = tl.minimum(low, high)
    # The tiles in which rows end come first, so that their scores bound the reach of the bias.
    nearest = tl.minimum(tl.maximum(seen_end // TILE, low), tl.maximum(high - 1, low))
    slots = tl.full((TILE, TILE), float("-inf"), tl.float32)
    maxima = tl.full((TILE, SPAN), float("-inf"), tl.float32)
    if high - nearest <= SPAN:
        slots, maxima = _visit(
            nearest, high, high, slots, maxima, q, k_source, batch, head // GROUP, stride_kn, dims, head_dim,
            rows, queries, keys, start, end, seen_start, seen_end, factor, slope, mask_base, stride_mn, stride_mk,
            SPAN=SPAN, TILE=TILE, RANGE_KIND=RANGE_KIND, HAS_MASK=HAS_MASK, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
            DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
        farthest = farthest_reached(q, slots, key_length, factor, slope, inside, end, keys)
        low = tl.minimum(tl.maximum(low, tl.maximum(farthest, 0) // TILE), nearest)
    if high - low > SPAN:
        if tl.atomic_add(asked_ptr + block, 1) == 0:
            _enqueue(queue_ptr, queued_ptr, block)
        return
    slots, maxima = _visit(
        low, nearest, high, slots, maxima, q, k_source, batch, head // GROUP, stride_kn, dims, head_dim,
        rows, queries, keys, start, end, seen_start, seen_end, factor, slope, mask_base, stride_mn, stride_mk,
        SPAN=SPAN, TILE=TILE, RANGE_KIND=RANGE_KIND, HAS_MASK=HAS_MASK, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
        DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip
    tau, empty = class_bound(slots, inside, alpha_head, exponent, STEPS=STEPS, ALPHA_KIND=ALPHA_KIND, CLAMPED=True)

    tiles = high - 1 - tl.arange(0, SPAN)
    alive = tl.max((maxima > tau[:, None]).to(tl.int32), 0)
    count = tl.sum(alive, 0)
    lists = list_ptr + list_row * key_tiles
    tl.store(lists + count - tl.cumsum(alive, 0), tiles.to(tl.int16), mask=alive > 0)
    tl.debug_barrier()
    acc = tl.zeros((TILE, BLOCK_D), tl.float32)
    parts = tl.zeros((TILE, 4), tl.float32)
    slope_parts = tl.zeros((TILE, 4), tl.float32)
    support_parts = tl.zeros((TILE, 4), tl.float32)
    for index in range(0, turns(count)):
        first = turn_start(lists, index, count, key_tiles, TILE=TILE, BLOCK_N=TILE)
        k = load_block(
            k_source, batch, head // GROUP, first, stride_kn, dims, keys, head_dim,
            BLOCK=TILE, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip
        x = edge_scores(
            q, k, first, rows, queries, keys, start, end, seen_start, seen_end, factor, slope,
            mask_base, stride_mn, stride_mk,
            BLOCK_N=TILE, RANGE_KIND=RANGE_KIND, HAS_SLOPES=True, HAS_MASK=HAS_MASK, PRECISION=PRECISION, FUSED=True,
        )  # fmt: skip
        p, u = weights(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND, CLAMPED=True)
        parts += lane_sums(p)
        slope_parts += lane_sums(u)
        if ALPHA_KIND == 15:
            support_parts += lane_sums(on_support(u))
        v = load_block(
            v_source, batch, head // GROUP, first, stride_wn, dims, keys, head_dim,
            BLOCK=TILE, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    sums = tl.sum(parts, 1)
    if tl.max(tl.where(empty, 0.0, tl.abs(sums - 1.0)), 0) > TOLERANCE:
        # Keys of one class hold weight, more than what follows corrects.
        if tl.atomic_add(asked_ptr + block, 1) == 0:
            _enqueue(queue_ptr, queued_ptr, block)
        return
    tl.store(count_ptr + list_row, settled(count))
    if stray_count_ptr is not None:
        tl.store(stray_count_ptr + list_row, 0)
    if SAVE:
        flag = tl.full((SPAN,), 1, tl.uint8)
        if RANGE_KIND == 2:
            whole = (tiles * TILE >= seen_start) & (tiles * TILE + TILE <= seen_end)
            flag = tl.where(whole, 2, 1).to(tl.uint8)
        map_rows = head_index.to(tl.int64) * key_tiles + tiles
        tl.store(map_ptr + map_rows * query_tiles + row_tile, flag, mask=alive > 0)
    # As in the forward without a mean: what the sum of p is too much is taken from the weights in proportion.
    correction = last_step(
        sums, tl.sum(slope_parts, 1), tl.sum(support_parts, 1), exponent, alpha_head, ALPHA_KIND=ALPHA_KIND
    )
    tau = tl.where(empty, float("inf"), tau + correction)
    tl.store(tau_ptr + head_index.to(tl.int64) * queries + rows, tau, mask=row_mask)
    acc /= tl.where(sums > 0, sums, 1.0)[:, None]
    o_base = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    o_base += row_tile.to(tl.int64) * TILE * stride_on
    tl.store(o_base + local[:, None] * stride_on + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=tile_mask)


def settles(configuration, kind, dtype, slopes):
    """Whether a call has tiles that may be settled here: float32 is held to more than one step leaves."""
    known = kind in (BELOW_2, ENTMAX15, SPARSEMAX)
    return slopes is not None and configuration.near_tiles > 0 and known and dtype != torch.float32


def settle(call, save, row_limit=0):
    """`Near`, or None for a call in which nothing is settled. row_limit as in `threshold_bound`."""
    query, key, value, config = call.query, call.key, call.value, call.configuration
    if not call.has_near:
        return None
    batch, heads, queries, head_dim = query.shape
    device, launch = query.device, config.near
    blocks = triton.cdiv(queries, config.threshold_rows)
    total = batch * heads * blocks
    tile_map = None
    if save:
        shape = (batch, heads, call.key_tiles, call.query_tiles)
        tile_map = torch.zeros(shape, dtype=torch.uint8, device=device)
    # The first two are the dense pass's, the third counts the queue, then a flag for each that may be in it.
    queued = torch.zeros(3 + total, dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, call.query_tiles), dtype=torch.int32, device=device)
    near = Near(
        out=torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2),
        tau=torch.empty((batch, heads, queries), dtype=torch.float32, device=device),
        tiles=torch.empty((*counts.shape, call.key_tiles), dtype=torch.int16, device=device),
        counts=counts,
        stray_counts=torch.empty_like(counts) if row_limit else None,
        tile_map=tile_map,
        lengths=longest_keys(key),
        queue=torch.empty(total, dtype=torch.int32, device=device),
        queued=queued,
    )
    _near_kernel[(counts.numel(),)](
        query, key, value, call.descriptor(key, TILE), call.descriptor(value, TILE),
        call.alpha_tensor, call.slopes, call.visible, call.mask, near.lengths,
        near.tiles, counts, near.stray_counts, tile_map, near.tau, near.out,
        near.queue, queued,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *near.out.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, key.shape[2], call.query_tiles, call.key_tiles, blocks, head_dim,
        **call.constants,
        DESCRIPTORS=call.descriptors,
        SPAN=config.near_tiles,
        TILE=TILE,
        BLOCK_TILES=config.threshold_rows // TILE,
        SAVE=save,
        TOLERANCE=TOLERANCES[query.dtype],
        STEPS=STEPS,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.limit(),
    )  # fmt: skip
    return near
