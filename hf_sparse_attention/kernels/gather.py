"""Tiles that hold few weights leave the lists, their (query, key) pairs become strays: the cost follows the weights.

Enters: the lists and the bound of `threshold`. Leaves: shorter lists, written in place, and `Strays`. Every pair above
the bound is in a listed tile or a stray, in an order that depends on nothing but the inputs: exact, the same bits.
"""

import torch
import triton
import triton.language as tl

from .compiling import Kernel
from .configurations import TILE, processors
from .strays import ROW_BIT, Strays, gather_rows, stray_codes, stray_places
from .tiles import (
    entmax_parameters,
    key_scores,
    listed_start,
    load_block,
    masked_scores,
    row_ranges,
    whole_tiles,
)

# Listed tiles sorted out at once, and the fewest in a list that are worth it.
SEGMENT = 8
FEWEST = 4


@triton.jit
def _ones(words):
    """Bits set in each int32."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    return ((bits + (bits >> 16)) & 63).to(tl.int32)


@triton.jit
def _mark(
    begin, stop, base, lists, q, k_source, batch, group, stride_kn, dims, head_dim, scratch, local, rows, queries,
    keys, start, end, factor, slope, limit, mask_base, stride_mn, stride_mk,
    MASKED: tl.constexpr,
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
):  # fmt: skip
    """Pieces begin..stop of the list: a bit per row and key goes to the scratch, set where x is above the limit."""
    WORDS: tl.constexpr = BLOCK_N // 32
    bit = tl.full((32,), 1, tl.int32) << tl.arange(0, 32)
    word = tl.arange(0, WORDS)
    for index in range(begin, stop):
        first = listed_start(lists, index, TILE=TILE, BLOCK_N=BLOCK_N)
        k = load_block(
            k_source, batch, group, first, stride_kn, dims, keys, head_dim,
            BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=MASKED, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip
        # Without a bias the factor is in the limit.
        x = key_scores(
            q, k, first, rows, queries, keys, start, end, factor if HAS_SLOPES else 1.0, slope,
            mask_base, stride_mn, stride_mk,
            BLOCK_N=BLOCK_N, MASKED=MASKED, RANGE_KIND=RANGE_KIND,
            HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK, PRECISION=PRECISION,
        )  # fmt: skip
        x = tl.reshape(x, (BLOCK_M, WORDS, 32))
        words = tl.sum(tl.where(x > limit[:, None, None], bit[None, None, :], 0), 2)
        place = ((index - base) * WORDS + word)[None, :] * BLOCK_M + local[:, None]
        tl.store(scratch + place, words)


@Kernel
@triton.jit(do_not_specialize=["queries", "keys", "units", "total", "list_queries", "key_tiles", "excess", "scaling"])
def _collect_kernel(
    q_ptr, k_ptr, k_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr,
    list_ptr, count_ptr, bound_ptr, map_ptr, scratch_ptr, code_ptr, score_ptr, stray_count_ptr, stray_map_ptr,
    excess, scaling,
    stride_sb, stride_sh, stride_sn,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, units, total, list_queries, key_tiles, head_dim,
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
    ROOM: tl.constexpr,
    LIMIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    FEWEST: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = BLOCK_M // TILE
    PIECES: tl.constexpr = TILE // BLOCK_N
    COLUMNS: tl.constexpr = SEGMENT * TILE // 32
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    group = tl.arange(0, GROUPS)
    scan = tl.arange(0, SEGMENT)
    columns = tl.arange(0, COLUMNS)
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * COLUMNS * BLOCK_M
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        head_index = work // units
        row_tile = units - 1 - work % units
        first_tile = row_tile * GROUPS
        batch = head_index // heads
        head = head_index % heads
        rows = row_tile * BLOCK_M + local
        listed = tl.load(count_ptr + work - work % units + row_tile)
        # A short list is walked as it is.
        count = tl.where(listed >= FEWEST, listed, 0)
        known = first_tile + group < list_queries
        lists = list_ptr + (head_index.to(tl.int64) * units + row_tile) * key_tiles
        alpha_head, exponent, factor, slope = entmax_parameters(
            alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
        )
        row_mask = rows < queries
        q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        q_base += row_tile.to(tl.int64) * BLOCK_M * stride_qn
        q_mask = row_mask[:, None] & (dims < head_dim)[None, :]
        q = tl.load(q_base + local[:, None] * stride_qn + dims[None, :], mask=q_mask, other=0.0)
        k_base = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kg
        k_source = k_descriptor if DESCRIPTORS else k_base
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
        visible_base = visible_ptr
        if RANGE_KIND == 2:
            visible_base += batch.to(tl.int64) * stride_vb
        start, end = row_ranges(visible_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND)
        bound = tl.load(bound_ptr + head_index.to(tl.int64) * queries + rows, mask=row_mask, other=float("inf"))
        limit = bound if HAS_SLOPES else bound / factor
        offset = batch.to(tl.int64) * stride_sb + head.to(tl.int64) * stride_sh
        offset += row_tile.to(tl.int64) * BLOCK_M * stride_sn
        capacity = tl.minimum(queries - row_tile * BLOCK_M, BLOCK_M) * ROOM

        whole = whole_tiles(count, RANGE_KIND=RANGE_KIND, BLOCK_M=BLOCK_M, TILE=TILE) * PIECES
        kept = 0
        strays = 0
        for base in range(0, count, SEGMENT):
            begin = base * PIECES
            # Where most tiles stay in the list, or the strays have filled their room, the rest stays unseen.
            worth = (kept * 4 <= base * 3) & (strays + LIMIT <= capacity)
            stop = tl.where(worth, tl.minimum(base + SEGMENT, count) * PIECES, begin)
            middle = tl.minimum(tl.maximum(whole, begin), stop)
            _mark(
                begin, middle, begin, lists, q, k_source, batch, head // GROUP, stride_kn, dims, head_dim,
                scratch, local, rows, queries, keys, start, end, factor, slope, limit, mask_base, stride_mn, stride_mk,
                MASKED=False, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILE=TILE, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
                DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
            )  # fmt: skip
            _mark(
                middle, stop, begin, lists, q, k_source, batch, head // GROUP, stride_kn, dims, head_dim,
                scratch, local, rows, queries, keys, start, end, factor, slope, limit, mask_base, stride_mn, stride_mk,
                MASKED=True, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILE=TILE, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
                DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            inside = base + scan < count
            tiles = tl.load(lists + base + scan, mask=inside, other=0).to(tl.int32)
            words = tl.load(
                scratch + columns[:, None] * BLOCK_M + local[None, :],
                mask=(base * (TILE // 32) + columns < count * (TILE // 32))[:, None],
                other=0,
            )
            bits = _ones(words)
            column_total = tl.sum(bits, 1)
            tile_total = tl.sum(tl.reshape(column_total, (SEGMENT, TILE // 32)), 1)
            few = (tile_total > 0) & (tile_total <= tl.where(worth, LIMIT, 0))
            sizes = tl.where(few, tile_total, 0)
            few = few & (strays + tl.cumsum(sizes, 0) <= capacity)
            sizes = tl.where(few, tile_total, 0)
            tile_start = strays + tl.cumsum(sizes, 0) - sizes
            taken = tl.reshape(tl.broadcast_to(few.to(tl.int32)[:, None], (SEGMENT, TILE // 32)), (COLUMNS,))
            column_sizes = taken * column_total
            column_start = strays + tl.cumsum(column_sizes, 0) - column_sizes
            # By tile, then by half of the tile, then by row, then by key.
            place = column_start[:, None] + tl.cumsum(bits, 1) - bits
            bits = bits * taken[:, None]
            key_base = tl.reshape(tl.broadcast_to(tiles[:, None], (SEGMENT, TILE // 32)), (COLUMNS,)) * TILE
            code_base = (key_base + (columns % (TILE // 32)) * 32)[:, None] + (local << ROW_BIT)[None, :]
            for turn in range(0, tl.max(tl.max(bits, 1), 0)):
                lowest = words & -words
                words = words ^ lowest
                # The exponent of a power of two is the number of its bit.
                number = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
                entry = place + turn
                pointers = code_ptr + stray_places(offset, stride_sn, entry, ROOM=ROOM)
                tl.store(pointers, code_base + number, mask=turn < bits)
            # All have read the list before it is written anew, from its start.
            tl.debug_barrier()
            keep = (inside & (tile_total >= tl.where(worth, 1, 0)) & (few == 0)).to(tl.int32)
            tl.store(lists + kept + tl.cumsum(keep, 0) - keep, tiles.to(tl.int16), mask=keep > 0)
            kept += tl.sum(keep, 0)
            strays += tl.sum(sizes, 0)
            if SAVE:
                map_rows = (head_index.to(tl.int64) * key_tiles + tiles) * list_queries + first_tile
                gone = (inside & (keep == 0))[:, None] & known[None, :]
                tl.store(
                    map_ptr + map_rows[:, None] + group[None, :], tl.zeros((SEGMENT, GROUPS), tl.uint8), mask=gone
                )
                tl.store(stray_map_ptr + map_rows, tile_start * 256 + sizes, mask=few)
            tl.debug_barrier()
        if listed >= 0:
            tl.store(stray_count_ptr + head_index.to(tl.int64) * list_queries + first_tile, strays)
        if count > 0:
            tl.store(count_ptr + work - work % units + row_tile, kept)

        # The scores, kept so that all passes see the same. Strays are rows here: a sum along rows stays in a thread.
        for index in tl.range(0, tl.cdiv(strays, BLOCK_N), num_stages=1):
            entries, places, held, own, chosen = stray_codes(
                code_ptr, offset, stride_sn, index, strays, ROOM=ROOM, BLOCK_N=BLOCK_N
            )
            k = gather_rows(k_base + chosen.to(tl.int64) * stride_kn, held, dims, head_dim, EVEN_D=EVEN_D)
            x = masked_scores(
                tl.dot(k, tl.trans(q), input_precision=PRECISION), factor, slope, chosen[:, None],
                start[None, :], end[None, :], mask_ptr, True,
                MASKED=False, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=False,
            )  # fmt: skip
            scores = tl.sum(tl.where(own[:, None] == local[None, :], x, 0.0), 1)
            tl.store(score_ptr + places, scores, mask=held)
        tl.debug_barrier()


def collects(config, group, queries, key_tiles):
    """Whether a call has strays: a list can be long enough, a query of the group and a key of a tile fit a code."""
    return config.stray_limit > 0 and key_tiles >= FEWEST and group * queries * TILE < 2**31


def collect(call, bound, lists, save):
    """Takes the tiles with few pairs above the bound out of the lists, in place; their `Strays`, or None if off."""
    query, key, config = call.query, call.key, call.configuration
    batch, heads, queries, head_dim = query.shape
    device = query.device
    if not collects(config, call.group, queries, call.key_tiles):
        return None
    tile_map = out = None
    if save:
        room = config.stray_room
        pool = torch.empty((batch, heads, queries, 2 * room), dtype=torch.int32, device=device)
        tile_map = torch.zeros((batch, heads, call.key_tiles, call.query_tiles), dtype=torch.int32, device=device)
    else:
        # Nothing outlives the call, so the strays of a row lie where its output will.
        row_bytes = head_dim * query.element_size()
        if row_bytes < 8 or row_bytes % 4:
            return None
        # Divisions by a power of two cost nothing.
        room = 1 << ((row_bytes // 8).bit_length() - 1)
        out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
        pool = out.view(torch.int32)[..., : 2 * room]
    counts = torch.empty((batch, heads, call.query_tiles), dtype=torch.int32, device=device)
    strays = Strays(pool, counts, tile_map, out)
    for rows, tiles, tile_counts in lists.walks():
        launch = config.collect if rows == TILE else config.collect_pairs
        total = tile_counts.numel()
        programs = min(total, config.collect_programs * TILE // rows * processors(device.index))
        scratch = torch.empty((programs, SEGMENT * TILE // 32, rows), dtype=torch.int32, device=device)
        _collect_kernel[(programs,)](
            query, key, call.descriptor(key), call.alpha_tensor, call.slopes, call.visible, call.mask,
            tiles, tile_counts, bound, lists.tile_map, scratch, strays.codes, strays.scores, counts, tile_map,
            call.excess, call.scaling,
            *strays.codes.stride()[:3], *query.stride()[:3], *key.stride()[:3],
            *call.visible_strides, *call.mask_strides,
            heads, queries, key.shape[2], tile_counts.shape[2], total, call.query_tiles, call.key_tiles, head_dim,
            **call.constants,
            DESCRIPTORS=call.descriptors,
            BLOCK_M=rows,
            BLOCK_N=config.inner,
            TILE=TILE,
            SAVE=save,
            ROOM=room,
            LIMIT=min(config.stray_limit * rows // TILE, 255),
            SEGMENT=SEGMENT,
            FEWEST=FEWEST,
            num_warps=launch.warps,
            num_stages=launch.stages,
            **launch.limit(),
        )  # fmt: skip
    return strays
