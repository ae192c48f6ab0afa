"""The one dense pass: query, key -> a lower bound of tau per row and the list of tiles that can still hold weight.

tau of any subset of the keys is a lower bound of the row's tau. The pass keeps, per row, the maximum of 64 interleaved
classes of keys (a subset whose tau is close to the row's own, wherever the weight sits) and of every tile; a tile
survives if one of its rows has a maximum above the row's bound.
"""

import torch
import triton
import triton.language as tl

from .compiling import Kernel
from .configurations import TILE, processors
from .lists import Lists, Sparse
from .maxima import class_bound, farthest_reached, longest_keys, visit_keys
from .tiles import entmax_parameters, row_ranges, share_of

# Tiles scanned at once for the lists, and Newton steps on the classes: more steps no longer tighten the bound.
SCAN = 32
STEPS = 5


@Kernel
@triton.jit(
    do_not_specialize=[
        "queries",
        "keys",
        "query_tiles",
        "total",
        "list_queries",
        "list_keys",
        "pair_rows",
        "at_once",
        "excess",
        "scaling",
    ]  # fmt: skip
)
def _threshold_kernel(
    q_ptr, k_ptr, k_descriptor, alpha_ptr, slopes_ptr, visible_ptr, mask_ptr, reach_ptr,
    scratch_ptr, counter_ptr, tau_ptr, list_ptr, count_ptr, pair_ptr, pair_count_ptr, map_ptr, rows_ptr,
    queue_ptr, stray_count_ptr, near_queue_ptr,
    excess, scaling,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_mk,
    heads, queries, keys, query_tiles, total, list_queries, list_keys, pair_rows, head_dim, at_once,
    GROUP: tl.constexpr,
    ALPHA_KIND: tl.constexpr,
    RANGE_KIND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    SAVE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROW_LIMIT: tl.constexpr,
    FEWEST: tl.constexpr,
    PAIR_TENTHS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = BLOCK_M // TILE
    CLAMPED: tl.constexpr = q_ptr.dtype.element_ty != tl.float32 and ALPHA_KIND != 0
    PIECES: tl.constexpr = BLOCK_N // TILE
    local_rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    own_scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * (tl.cdiv(list_keys, PIECES) * PIECES) * BLOCK_M
    if near_queue_ptr is not None:
        total = tl.load(counter_ptr + 2)
    work = tl.atomic_add(counter_ptr, 1)
    while work < total:
        if near_queue_ptr is not None:
            item = tl.load(near_queue_ptr + work)
            head_index = item // query_tiles
            row_tile = item % query_tiles
        else:
            # The heaviest tiles come first: causal rows see more keys the later they are.
            head_index, place_index = share_of(work, total, query_tiles, at_once)
            row_tile = query_tiles - 1 - place_index
        batch = head_index // heads
        head = head_index % heads
        rows = row_tile * BLOCK_M + local_rows
        alpha_head, exponent, factor, slope = entmax_parameters(
            alpha_ptr, excess, slopes_ptr, scaling, head, HAS_ALPHA, HAS_SLOPES
        )
        q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        q_base += row_tile.to(tl.int64) * BLOCK_M * stride_qn
        q_mask = (rows < queries)[:, None] & (dims < head_dim)[None, :]
        q = tl.load(q_base + local_rows[:, None] * stride_qn + dims[None, :], mask=q_mask, other=0.0)
        if DESCRIPTORS:
            k_source = k_descriptor
        else:
            k_source = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kg
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh

        v_base = visible_ptr
        if RANGE_KIND == 2:
            v_base += batch.to(tl.int64) * stride_vb
        start, end = row_ranges(v_base, stride_vn, rows, queries, keys, RANGE_KIND=RANGE_KIND)
        inside = (rows < queries) & (start < end)
        low = tl.min(tl.where(inside, start, keys), 0) // BLOCK_N
        high = tl.cdiv(tl.max(tl.where(inside, end, 0), 0), BLOCK_N)
        low = tl.minimum(low, high)
        scratch = own_scratch
        if RANGE_KIND == 2:
            # Wherever the rows look, the program writes the same few lines of the cache.
            scratch += -low.to(tl.int64) * PIECES * BLOCK_M
        # Tiles every row sees whole need no mask; rows that see nothing do not count, they are set aside at the end.
        full_low = tl.cdiv(tl.max(tl.where(inside, start, 0), 0), BLOCK_N)
        full_high = tl.min(tl.where(inside, end, keys), 0) // BLOCK_N
        full_low = tl.minimum(tl.maximum(full_low, low), high)
        full_high = tl.minimum(tl.maximum(full_high, full_low), high)
        if HAS_SLOPES:
            # The nearest tile comes first, so that its scores bound the reach of the bias.
            full_high = tl.minimum(full_high, tl.maximum(high - 1, low))
            full_low = tl.minimum(full_low, full_high)

        slots = tl.full((BLOCK_M, TILE), float("-inf"), tl.float32)
        # Blocks that need a mask: the last ones and, with ranges, the first ones. One walk takes both, unless the last
        # ones must say how far a bias lets the first ones reach.
        TOGETHER: tl.constexpr = RANGE_KIND == 2 and not HAS_SLOPES
        slots = visit_keys(
            low if TOGETHER else full_high, high, full_low, full_high, q, slots, k_source, batch, head // GROUP,
            stride_kn, dims, head_dim, scratch, local_rows, rows, queries, keys,
            start, end, factor, slope, mask_base, stride_mn, stride_mk,
            MASKED=True, HAS_GAP=TOGETHER, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILE=TILE, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
            DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
        if HAS_SLOPES:
            key_length = tl.load(reach_ptr + batch * (heads // GROUP) + head // GROUP)
            farthest = farthest_reached(q, slots, key_length, factor, slope, inside, end, keys)
            low = tl.where(slope > 0, tl.maximum(low, tl.maximum(farthest, 0) // BLOCK_N), low)
            low = tl.minimum(low, high)
            full_low = tl.maximum(full_low, low)
            full_high = tl.maximum(full_high, full_low)
        if RANGE_KIND == 2 and HAS_SLOPES:
            slots = visit_keys(
                low, full_low, 0, 0, q, slots, k_source, batch, head // GROUP, stride_kn, dims, head_dim,
                scratch, local_rows, rows, queries, keys,
                start, end, factor, slope, mask_base, stride_mn, stride_mk,
                MASKED=True, HAS_GAP=False, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILE=TILE, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
                DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
            )  # fmt: skip
        slots = visit_keys(
            full_low, full_high, 0, 0, q, slots, k_source, batch, head // GROUP, stride_kn, dims, head_dim,
            scratch, local_rows, rows, queries, keys,
            start, end, factor, slope, mask_base, stride_mn, stride_mk,
            MASKED=False, HAS_GAP=False, RANGE_KIND=RANGE_KIND, HAS_SLOPES=HAS_SLOPES, HAS_MASK=HAS_MASK,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILE=TILE, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
            DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip

        if not HAS_SLOPES:
            slots *= factor
        tau, empty = class_bound(
            slots, inside, alpha_head, exponent, STEPS=STEPS, ALPHA_KIND=ALPHA_KIND, CLAMPED=CLAMPED
        )
        tau_rows = head_index.to(tl.int64) * queries + rows
        tl.store(tau_ptr + tau_rows, tl.where(empty, float("inf"), tau), mask=rows < queries)

        # The list of every TILE rows: tiles with a row whose maximum exceeds the row's bound, ascending.
        tl.debug_barrier()
        group = tl.arange(0, GROUPS)
        threshold = tau if HAS_SLOPES else tau / factor
        list_rows = head_index.to(tl.int64) * list_queries + row_tile * GROUPS + group
        count = tl.zeros((GROUPS,), tl.int32)
        known = (row_tile * GROUPS + group) < list_queries
        first = low * PIECES
        last = tl.minimum(high * PIECES, list_keys)
        union = 0
        sparse = tl.zeros((GROUPS,), tl.int32)
        scan = tl.arange(0, SCAN)
        if SPLIT:
            # From where to where TILE rows see every tile whole.
            whole_low = tl.cdiv(tl.max(tl.reshape(tl.where(inside, start, 0), (GROUPS, TILE)), 1), TILE)
            whole_high = tl.min(tl.reshape(tl.where(inside, end, keys), (GROUPS, TILE)), 1) // TILE
        for base in range(first, last, SCAN):
            tiles = base + scan
            maxima = tl.load(
                scratch + tiles[None, :] * BLOCK_M + local_rows[:, None],
                mask=(tiles < last)[None, :],
                other=float("-inf"),
            )
            alive = (maxima > threshold[:, None]).to(tl.int32)
            alive = tl.reshape(alive, (GROUPS, TILE, SCAN))
            if ROW_LIMIT > 0:
                row_count = tl.sum(alive, 1)
                alive = tl.minimum(row_count, 1)
            else:
                alive = tl.max(alive, 1)
            place = count[:, None] + tl.cumsum(alive, 1) - alive
            wide_tiles = tl.broadcast_to(tiles[None, :], (GROUPS, SCAN)).to(tl.int16)
            chosen = (alive > 0) & known[:, None]
            tl.store(list_ptr + list_rows[:, None] * list_keys + place, wide_tiles, mask=chosen)
            if ROW_LIMIT > 0:
                tl.store(rows_ptr + list_rows[:, None] * list_keys + place, row_count.to(tl.uint8), mask=chosen)
                sparse += tl.sum(((row_count > 0) & (row_count <= ROW_LIMIT)).to(tl.int32), 1)
            count += tl.sum(alive, 1)
            if SAVE:
                flag = tl.full((GROUPS, SCAN), 1, tl.uint8)
                if SPLIT:
                    whole = (tiles[None, :] >= whole_low[:, None]) & (tiles[None, :] < whole_high[:, None])
                    flag = tl.where(whole, 2, 1).to(tl.uint8)
                map_rows = head_index.to(tl.int64) * list_keys + tiles
                map_columns = row_tile * GROUPS + group
                tl.store(
                    map_ptr + map_rows[None, :] * list_queries + map_columns[:, None],
                    flag,
                    mask=chosen,
                )
            if GROUPS > 1 and PAIR_TENTHS > 0:
                either = tl.max(alive, 0)
                pair_place = union + tl.cumsum(either, 0) - either
                pair_list = pair_ptr + (head_index.to(tl.int64) * pair_rows + row_tile) * list_keys
                tl.store(pair_list + pair_place, tiles.to(tl.int16), mask=either > 0)
                union += tl.sum(either, 0)
        # Only rows by themselves have strays, which win more than pairs if more than a third of the tiles is sparse.
        third = tl.sum(sparse, 0) * 3 > tl.sum(count, 0)
        if GROUPS > 1 and PAIR_TENTHS > 0:
            # Rows that share most of their tiles are walked together, with half the traffic; the others by themselves.
            together = (union > 0) & (union * 10 <= tl.sum(count, 0) * PAIR_TENTHS)
            if ROW_LIMIT > 0:
                together = together & (third == 0)
            tl.store(pair_count_ptr + head_index.to(tl.int64) * pair_rows + row_tile, tl.where(together, union, -1))
            count = tl.where(together, -1, count)
        tl.store(count_ptr + list_rows, count, mask=known)
        if ROW_LIMIT > 0:
            tl.store(stray_count_ptr + list_rows, tl.zeros((GROUPS,), tl.int32), mask=known)
            queued = (known & (count >= 0) & (sparse >= FEWEST)).to(tl.int32)
            if GROUPS > 1 and PAIR_TENTHS == 0:
                queued *= third.to(tl.int32)
            for member in tl.static_range(GROUPS):
                if tl.sum(tl.where(group == member, queued, 0), 0) > 0:
                    # The order hangs on who comes first; nothing that is computed hangs on the order.
                    tl.store(
                        queue_ptr + tl.atomic_add(counter_ptr + 1, 1),
                        head_index * list_queries + row_tile * GROUPS + member,
                    )
        tl.debug_barrier()
        work = tl.atomic_add(counter_ptr, 1)


def threshold_bound(call, save, row_limit=0, fewest=1, near=None):
    """Lower bound of tau (B, H, N) and the tile lists with their lengths, as `Lists`.

    row_limit: in how many rows a tile that may be taken apart is alive at most, 0: none may; lists with fewer than
    fewest such tiles stay as they are. near: what is settled, whose tensors are completed.
    """
    query, key, config = call.query, call.key, call.configuration
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    device = query.device
    rows = config.threshold_rows
    row_tiles = triton.cdiv(queries, rows)
    tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    pairs = pair_counts = tile_map = sparse = alive_rows = queue = stray_counts = reach = near_queue = None
    if near is None:
        lists = torch.empty((batch, heads, call.query_tiles, call.key_tiles), dtype=torch.int16, device=device)
        counts = torch.empty((batch, heads, call.query_tiles), dtype=torch.int32, device=device)
        counter = torch.zeros((2,), dtype=torch.int32, device=device)
        if row_limit:
            stray_counts = torch.empty_like(counts)
        if save:
            shape = (batch, heads, call.key_tiles, call.query_tiles)
            tile_map = torch.zeros(shape, dtype=torch.uint8, device=device)
        if call.slopes is not None:
            reach = longest_keys(key)
    else:
        lists, counts, counter = near.tiles, near.counts, near.queued
        stray_counts, tile_map, reach, near_queue = near.stray_counts, near.tile_map, near.lengths, near.queue
    if config.paired:
        pairs = torch.empty((batch, heads, row_tiles, call.key_tiles), dtype=torch.int16, device=device)
        pair_counts = torch.empty((batch, heads, row_tiles), dtype=torch.int32, device=device)
    if row_limit:
        alive_rows = torch.empty_like(lists, dtype=torch.uint8)
        queue = torch.empty_like(counts)
        sparse = Sparse(alive_rows, queue, counter, stray_counts)
    total = row_tiles * heads * batch
    programs = min(total, config.threshold_programs * processors(device.index))
    pieces = config.threshold_columns // TILE
    padded_tiles = triton.cdiv(call.key_tiles, pieces) * pieces
    scratch = torch.empty((programs, padded_tiles, rows), dtype=torch.float32, device=device)
    # What the programs keep of the tiles lies in the same cache: where it fills that, all had better read one head.
    at_once = call.heads_at_once if scratch.nbytes <= 2 * config.resident else 1
    _threshold_kernel[(programs,)](
        query, key, call.descriptor(key, config.threshold_columns), call.alpha_tensor, call.slopes, call.visible,
        call.mask, reach,
        scratch, counter, tau, lists, counts, pairs, pair_counts, tile_map, alive_rows,
        queue, stray_counts, near_queue,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *call.visible_strides, *call.mask_strides,
        heads, queries, keys, row_tiles, total, call.query_tiles, call.key_tiles, row_tiles, head_dim,
        at_once,
        **call.constants,
        BLOCK_M=rows,
        BLOCK_N=config.threshold_columns,
        TILE=TILE,
        SAVE=save,
        SPLIT=save and call.visible is not None,
        ROW_LIMIT=row_limit,
        FEWEST=fewest,
        PAIR_TENTHS=config.pair_tenths,
        DESCRIPTORS=call.descriptors,
        SCAN=SCAN,
        STEPS=STEPS,
        num_warps=config.threshold.warps,
        num_stages=config.threshold.stages,
        **config.threshold.limit(),
    )  # fmt: skip
    return tau, Lists(lists, counts, pairs, pair_counts, tile_map, sparse)
