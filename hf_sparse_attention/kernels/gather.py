"""Tiles that hold few weights leave the lists, their (query, key) pairs become strays: the cost follows the weights.

Enters: the lists and the bound of `threshold`. Leaves: shorter lists, written in place, and `Strays`. Every pair above
the bound is in a listed tile or a stray, in an order that depends on nothing but the inputs: exact, the same bits.
"""

import torch
import triton
import triton.language as tl

from .compiling import Kernel
from .configurations import TILE, processors
from .edges import edge_scores, seen_by_all
from .strays import APART, ROW_BIT, Strays, gather_rows, stray_codes, stray_places
from .tiles import entmax_parameters, load_block, masked_scores, products, row_ranges

# Candidates sorted out at once, and the fewest in a list that are worth it; list entries looked at at once.
SEGMENT = 8
FEWEST = 4
SCAN = 128
# What stands in the place of a tile's number of rows once it has left the list.
GONE = tl.constexpr(255)


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
def _number_column(numbers, BLOCK_N: tl.constexpr):
    """Number of a bit in a word of `_marks` -> the column it stands for, counted from that of the word's first bit."""
    BITS: tl.constexpr = BLOCK_N // 4
    return numbers % BITS // 2 * 8 + numbers // BITS * 2 + numbers % 2


@triton.jit
def _marks(x, limit):
    """(M, N) -> (M, N / 32) words with a bit per column that is above the row's limit.

    A thread holds the columns 8 i + 2 j + 0 and 1 of a row, for one j: its bits are side by side, and are constants.
    """
    ROWS: tl.constexpr = x.shape[0]
    BITS: tl.constexpr = x.shape[1] // 4
    bit = tl.full((BITS,), 1, tl.int32) << tl.arange(0, BITS)
    bit = tl.reshape(bit, (1, BITS // 2, 1, 2))
    x = tl.reshape(x, (ROWS, BITS // 2, 4, 2))
    parts = tl.sum(tl.sum(tl.where(x > limit[:, None, None, None], bit, 0), 1), 2)
    parts = tl.reshape(parts, (ROWS, BITS // 8, 32 // BITS))
    return tl.sum(parts << (tl.arange(0, 32 // BITS) * BITS)[None, None, :], 2)


@Kernel
@triton.jit(do_not_specialize=["queries", "keys", "query_tiles", "key_tiles", "excess", "scaling"])
def _collect_kernel(
    q_ptr, k_ptr, k_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr,
    list_ptr, count_ptr, rows_ptr, queue_ptr, queued_ptr, taken_ptr, bound_ptr, map_ptr, scratch_ptr,
    code_ptr, score_ptr, stray_count_ptr, stray_map_ptr,
    excess, scaling,
    stride_sb, stride_sh, stride_sn,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, query_tiles, key_tiles, head_dim,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVE: tl.constexpr,
    ROOM: tl.constexpr,
    LIMIT: tl.constexpr,
    ROW_LIMIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = TILE // BLOCK_N
    WORDS: tl.constexpr = TILE // 32
    COLUMNS: tl.constexpr = SEGMENT * WORDS
    local = tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_D)
    scan = tl.arange(0, SCAN)
    segment = tl.arange(0, SEGMENT)
    columns = tl.arange(0, COLUMNS)
    piece_words = tl.arange(0, BLOCK_N // 32)
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * COLUMNS * TILE
    # Of a candidate its tile and, in the upper half, its place in the list; behind the words of all programs.
    candidate_list = scratch_ptr + tl.num_programs(0).to(tl.int64) * COLUMNS * TILE
    candidate_list += tl.program_id(0).to(tl.int64) * key_tiles
    queued = tl.load(queued_ptr + 1)
    # Rows differ in their candidates: whoever is done takes the next.
    item = tl.atomic_add(taken_ptr, 1)
    while item < queued:
        work = tl.load(queue_ptr + item)
        head_index = work // query_tiles
        row_tile = work % query_tiles
        list_row = work.to(tl.int64)
        listed = tl.load(count_ptr + list_row)
        lists = list_ptr + list_row * key_tiles
        alive_rows = rows_ptr + list_row * key_tiles
        # A tile with many rows has more pairs than rows; of one with few most pairs are one to a row.
        candidates = 0
        for base in range(0, listed, SCAN):
            inside = base + scan < listed
            alive = tl.load(alive_rows + base + scan, mask=inside, other=GONE).to(tl.int32)
            tiles = tl.load(lists + base + scan, mask=inside, other=0).to(tl.int32)
            chosen = (alive <= ROW_LIMIT).to(tl.int32)
            place = candidates + tl.cumsum(chosen, 0) - chosen
            tl.store(candidate_list + place, (base + scan) * 65536 + tiles, mask=chosen > 0)
            candidates += tl.sum(chosen, 0)
        tl.debug_barrier()
        batch = head_index // heads
        head = head_index % heads
        rows = row_tile * TILE + local
        alpha_head, exponent, factor, slope = entmax_parameters(
            alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
        )
        row_mask = rows < queries
        q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        q_base += row_tile.to(tl.int64) * TILE * stride_qn
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
        seen_start, seen_end = seen_by_all(start, end, keys)
        bound = tl.load(bound_ptr + head_index.to(tl.int64) * queries + rows, mask=row_mask, other=float("inf"))
        # Without a bias the factor is in the limit.
        limit = bound if HAS_SLOPES else bound / factor
        offset = batch.to(tl.int64) * stride_sb + head.to(tl.int64) * stride_sh
        offset += row_tile.to(tl.int64) * TILE * stride_sn
        # The rows as the compiler does not see that they are side by side. It would read four words at once, and
        # then rearrange all of them for every stray that is written, which are not side by side.
        opaque = local ^ (listed >> 31)
        capacity = tl.minimum(queries - row_tile * TILE, TILE) * ROOM
        strays = 0
        left = 0
        for base in range(0, candidates, SEGMENT):
            # Where the strays have filled their room, the rest stays unseen.
            stop = tl.where(strays + LIMIT <= capacity, tl.minimum(base + SEGMENT, candidates), base)
            for index in range(base * PIECES, stop * PIECES):
                tile = tl.load(candidate_list + index // PIECES) & 65535
                first = tile * TILE + (index % PIECES) * BLOCK_N
                k = load_block(
                    k_source, batch, head // GROUP, first, stride_kn, dims, keys, head_dim,
                    BLOCK=BLOCK_N, BLOCK_D=BLOCK_D, MASKED=True, EVEN_D=EVEN_D, DESCRIPTORS=DESCRIPTORS,
                )  # fmt: skip
                x = edge_scores(
                    q, k, first, rows, queries, keys, start, end, seen_start, seen_end,
                    factor if HAS_SLOPES else 1.0, slope, mask_base, stride_mn, stride_mk,
                    BLOCK_N=BLOCK_N, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                    PRECISION=PRECISION, FUSED=False,
                )  # fmt: skip
                column = (index - base * PIECES) * (BLOCK_N // 32) + piece_words
                tl.store(scratch + column[None, :] * TILE + local[:, None], _marks(x, limit))
            tl.debug_barrier()
            seen = base + segment < stop
            codes = tl.load(candidate_list + base + segment, mask=seen, other=0)
            tiles = codes & 65535
            written = base * WORDS + columns < stop * WORDS
            words = tl.load(scratch + columns[:, None] * TILE + local[None, :], mask=written[:, None], other=0)
            bits = _ones(words)
            column_total = tl.sum(bits, 1)
            tile_total = tl.sum(tl.reshape(column_total, (SEGMENT, WORDS)), 1)
            few = seen & (tile_total <= LIMIT)
            sizes = tl.where(few, tile_total, 0)
            few = few & (strays + tl.cumsum(sizes, 0) <= capacity)
            sizes = tl.where(few, tile_total, 0)
            tile_start = strays + tl.cumsum(sizes, 0) - sizes
            taken = tl.reshape(tl.broadcast_to(few.to(tl.int32)[:, None], (SEGMENT, WORDS)), (COLUMNS,))
            column_sizes = taken * column_total
            column_start = strays + tl.cumsum(column_sizes, 0) - column_sizes
            # By tile, then by word, then by row, then by bit.
            place = tl.trans(column_start[:, None] + tl.cumsum(bits, 1) - bits)
            words = tl.load(scratch + columns[None, :] * TILE + opaque[:, None], mask=written[None, :], other=0)
            bits = _ones(words) * taken[None, :]
            key_base = tl.reshape(tl.broadcast_to(tiles[:, None], (SEGMENT, WORDS)), (COLUMNS,)) * TILE
            # A piece of BLOCK_N columns has words of their own, 4 columns apart.
            word = columns % WORDS
            key_base += word // (BLOCK_N // 32) * BLOCK_N + word % (BLOCK_N // 32) * (1024 // BLOCK_N // 4)
            code_base = key_base[None, :] + (local << ROW_BIT)[:, None]
            for turn in range(0, tl.max(tl.max(bits, 1), 0)):
                lowest = words & -words
                words = words ^ lowest
                # The exponent of a power of two is the number of its bit; unsigned, a division is a shift.
                number = lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.uint32, bitcast=True)
                number = (number >> 23) - 127
                column = _number_column(number, BLOCK_N=BLOCK_N).to(tl.int32)
                pointers = code_ptr + offset + stray_places(stride_sn, place + turn, ROOM=ROOM)
                tl.store(pointers, code_base + column, mask=turn < bits)
            tl.store(alive_rows + codes // 65536, tl.full((SEGMENT,), GONE, tl.uint8), mask=few)
            if SAVE:
                cells = (head_index.to(tl.int64) * key_tiles + tiles) * query_tiles + row_tile
                tl.store(map_ptr + cells, tl.full((SEGMENT,), APART, tl.uint8), mask=few)
                tl.store(stray_map_ptr + cells, tile_start * 256 + sizes, mask=few)
            strays += tl.sum(sizes, 0)
            left += tl.sum(few.to(tl.int32), 0)
            # All have read the scratch before it is written anew.
            tl.debug_barrier()
        if left > 0:
            kept = 0
            for base in range(0, listed, SCAN):
                inside = base + scan < listed
                alive = tl.load(alive_rows + base + scan, mask=inside, other=GONE).to(tl.int32)
                tiles = tl.load(lists + base + scan, mask=inside, other=0)
                # All have read the list before it is written anew, from its start.
                tl.debug_barrier()
                keep = (alive != GONE).to(tl.int32)
                tl.store(lists + kept + tl.cumsum(keep, 0) - keep, tiles, mask=keep > 0)
                kept += tl.sum(keep, 0)
            tl.store(count_ptr + list_row, kept)
            tl.store(stray_count_ptr + list_row, strays)

        # The scores, kept so that all passes see the same. Strays are rows here: sums along rows stay in a thread.
        for index in tl.range(0, tl.cdiv(strays, BLOCK_N), num_stages=1):
            entries, places, held, own, chosen = stray_codes(
                code_ptr, offset, stride_sn, index, strays, ROOM=ROOM, BLOCK_N=BLOCK_N
            )
            k = gather_rows(k_base + chosen.to(tl.int64) * stride_kn, held, dims, head_dim, EVEN_D=EVEN_D)
            x = masked_scores(
                products(k, q, PRECISION=PRECISION, FIRST=True), factor, slope, chosen[:, None],
                start[None, :], end[None, :], mask_ptr, True,
                MASKED=False, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=False,
            )  # fmt: skip
            scores = tl.sum(tl.where(own[:, None] == local[None, :], x, 0.0), 1)
            tl.store(score_ptr + offset + places, scores, mask=held)
        # The next row tile writes the candidates anew.
        tl.debug_barrier()
        item = tl.atomic_add(taken_ptr, 1)


def collects(config, group, queries, key_tiles, save):
    """Whether a call has strays: a list can be long enough, a query of the group and a key of a tile fit a code."""
    wanted = config.stray_limit > 0 and (save or config.stray_forward)
    return wanted and key_tiles >= FEWEST and group * queries * TILE < 2**31


def sparse_limits(call, save):
    """In how many rows a tile that may be taken apart is alive at most, and how many of them are worth it."""
    on = collects(call.configuration, call.group, call.query.shape[2], call.key_tiles, save)
    return call.configuration.stray_rows if on else 0, FEWEST


def collect(call, bound, lists, save, near=None):
    """Takes the tiles with few pairs above the bound out of the lists, in place; their `Strays`, or None if off."""
    query, key, config = call.query, call.key, call.configuration
    batch, heads, queries, head_dim = query.shape
    device = query.device
    if not collects(config, call.group, queries, call.key_tiles, save):
        return None
    tile_map = out = None
    if save:
        room = config.stray_room
        pool = torch.empty((batch, heads, queries, 2 * room), dtype=torch.int32, device=device)
        tile_map = torch.empty((batch, heads, call.key_tiles, call.query_tiles), dtype=torch.int32, device=device)
    else:
        # Nothing outlives the call, so the strays of a row lie where its output will.
        row_bytes = head_dim * query.element_size()
        if row_bytes < 8 or row_bytes % 4:
            return None
        # Divisions by a power of two cost nothing.
        room = 1 << ((row_bytes // 8).bit_length() - 1)
        if near is not None:
            out = near.out
        else:
            out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
        pool = out.view(torch.int32)[..., : 2 * room]
    # Rows that are walked in pairs share dense tiles: they are not in the queue.
    sparse = lists.sparse
    strays = Strays(pool, sparse.strays, tile_map, out)
    programs = min(lists.counts.numel(), config.collect_programs * processors(device.index))
    scratch = torch.empty(programs * (SEGMENT * TILE // 32 * TILE + call.key_tiles), dtype=torch.int32, device=device)
    _collect_kernel[(programs,)](
        query, key, call.descriptor(key), call.alpha_tensor, call.slopes, call.visible, call.mask,
        lists.tiles, lists.counts, sparse.rows, sparse.queue, sparse.queued,
        torch.zeros(1, dtype=torch.int32, device=device), bound, lists.tile_map, scratch,
        strays.codes, strays.scores, strays.counts, tile_map,
        call.excess, call.scaling,
        *strays.codes.stride()[:3], *query.stride()[:3], *key.stride()[:3],
        *call.visible_strides, *call.mask_strides,
        heads, queries, key.shape[2], call.query_tiles, call.key_tiles, head_dim,
        **call.constants,
        DESCRIPTORS=call.descriptors,
        BLOCK_N=config.inner,
        TILE=TILE,
        SAVE=save,
        ROOM=room,
        LIMIT=config.stray_limit,
        ROW_LIMIT=config.stray_rows,
        SEGMENT=SEGMENT,
        SCAN=SCAN,
        num_warps=config.collect.warps,
        num_stages=config.collect.stages,
        **config.collect.limit(),
    )  # fmt: skip
    return strays
