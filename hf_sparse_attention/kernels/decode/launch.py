"""The passes of decoding in order, with their scratch: scores, tau and the output of few keys, the output of many.

No grid depends on the data and nothing waits for the device, so a CUDA graph can hold them."""

import torch
import triton

from ..configurations import TILE, processors
from ..tiles import ENTMAX15
from . import output, scores, threshold
from .pages import ASKED, ASKED_AT_ONCE, PRECISION, REST, STATE, WORTH, bounds_of_pages, page_margin

# Rows of one program at most.
MOST_ROWS = 64
MOST_SPLITS = 128
PROGRAMS_PER_PROCESSOR = 3


def row_block(rows, precision):
    """Rows of one program: a power of two from 16, what a tensor core multiplies at least."""
    # Products without a tensor core hold their operands in registers.
    most = 16 if precision == "ieee" else MOST_ROWS
    return min(most, max(16, triton.next_power_of_2(rows)))


def split_count(group_tiles, device_index):
    """How many programs share the keys of one key head, at most, the same for every length."""
    return min(MOST_SPLITS, max(1, PROGRAMS_PER_PROCESSOR * processors(device_index) // group_tiles))


def division(call):
    """How a call is divided: row tiles of all key heads, rows of a program, most splits, and the kernels' sizes."""
    batch, heads, queries, _ = call.query.shape
    key_heads, keys = call.key.shape[1:3]
    block = row_block(queries * call.group, call.constants["PRECISION"])
    row_tiles = triton.cdiv(queries * call.group, block)
    group_tiles = batch * key_heads * row_tiles
    most = split_count(group_tiles, call.query.device.index)
    sizes = (
        heads,
        queries,
        keys,
        call.key_tiles,
        min(most, call.key_tiles),
        row_tiles,
        min(block, queries * call.group),
    )
    return group_tiles, block, most, sizes


def pages_read(call, pages):
    """How many of the pages a call reads, (row tiles of all key heads,)."""
    group_tiles, _, _, sizes = division(call)
    work = torch.empty((group_tiles, sizes[4], 2), dtype=torch.int32, device=call.query.device)
    run_passes(call, pages, work)
    return work[..., 0].sum(1)


def run_passes(call, pages=None, work=None):
    """Output (B, H, N, D), laid out (B, N, H, D), and tau (B, H, N), +inf in rows that see no key.

    pages: None, or the bounds of the keys' pages, as `pages.bounds_of_pages` takes them; without a state they never
        rest.
    work: with them, int32 (row tiles of all key heads, splits, 2) for the tiles each program reads and has.
    """
    query, key, value = call.query, call.key, call.value
    batch, heads, queries, head_dim = query.shape
    device = query.device
    group_tiles, block, most, sizes = division(call)
    tiles, splits, row_tiles, rows = sizes[3:]
    existing = triton.next_power_of_2(rows)

    def scratch(*shape, dtype=torch.float32):
        return torch.empty((group_tiles, *shape), dtype=dtype, device=device)

    stored, maxima = scratch(tiles, rows, TILE), scratch(rows, tiles)
    slots, lists = scratch(splits, rows, TILE), scratch(rows, tiles, dtype=torch.int32)
    # Tiles and keys of every split, the last shares rounded up.
    tile_lists, key_lists = (scratch((tiles + splits) * size, dtype=torch.int32) for size in (1, TILE))
    parts, sums = scratch(splits, rows, head_dim), scratch(splits, rows)
    counts, arrived = scratch(splits, 2, dtype=torch.int32), scratch(dtype=torch.int32)
    found, pending = (scratch(rows, size, dtype=torch.int32) for size in (threshold.HELD * TILE, 1))
    origin, level, bound = scratch(rows), scratch(rows), scratch(rows)
    tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
    constants = {name: call.constants[name] for name in ("GROUP", "RANGE_KIND", "HAS_ALPHA")}
    # Scores are kept in float32 whatever the input, and few: the exact functions cost nothing.
    constants["ALPHA_KIND"] = call.alpha_kind
    wide = {name: call.constants[name] for name in ("BLOCK_D", "EVEN_D", "PRECISION")}
    masks = {name: call.constants[name] for name in ("HAS_SLOPES", "HAS_MASK")}
    launch = launch_of(query.element_size(), call.block_dim, block)
    lower = upper = bounds = state = None
    if pages is not None:
        lower, upper, codes, ball, state = pages
        state = torch.zeros(STATE, dtype=torch.int32, device=device) if state is None else state
        work = scratch(splits, 2, dtype=torch.int32) if work is None else work
        bounds = scratch(rows, tiles)
        bounds_of_pages(call, (lower, upper, codes, ball, state), bounds, maxima, bound, sizes, block, launch)
    strides = [(0, 0, 0) if tensor is None else tensor.stride()[:3] for tensor in (lower, upper)]
    scores.scores_kernel[(group_tiles, splits)](
        query, key, call.alpha_tensor, call.slopes, call.visible, call.mask, lower, upper, bounds, state,
        tile_lists, work, bound, stored, maxima, slots,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *call.visible_strides, *call.mask_strides,
        *strides[0], *strides[1],
        *sizes, head_dim,
        **constants, **wide, **masks,
        HAS_PAGES=pages is not None,
        BLOCK_M=block,
        ROWS=existing,
        TILE=TILE,
        CHUNK_D=scores.chunk_of(call),
        SLACK=scores.SLACK,
        LEAST_TILES=scores.LEAST_TILES,
        STEPS=threshold.STEPS,
        SCAN=max(1, scores.AT_ONCE // existing),
        ASKED=ASKED,
        PAGES=ASKED_AT_ONCE,
        BOUND_PRECISION=PRECISION,
        MARGIN=page_margin(query),
        **launch,
    )  # fmt: skip
    threshold.threshold_kernel[(group_tiles * rows,)](
        value, call.alpha_tensor, call.visible, bound, work, state,
        stored, maxima, slots, lists, found, origin, level, pending, arrived, tau, out,
        call.excess,
        *value.stride()[:3], *call.visible_strides, *out.stride()[:3],
        *sizes, head_dim,
        **constants,
        HAS_STATE=pages is not None,
        BLOCK_M=block,
        BLOCK_D=call.block_dim,
        TILE=TILE,
        SPLITS=triton.next_power_of_2(most),
        SCAN=threshold.SCAN,
        HELD=threshold.HELD,
        SEARCHED=threshold.SEARCHED,
        SEARCH=threshold.SEARCH,
        KEYS=max(1, threshold.AT_ONCE // call.block_dim),
        STEPS=threshold.STEPS,
        TOLERANCE=1e-9 if call.alpha_kind == ENTMAX15 else 1e-7,
        REST=REST,
        WORTH=WORTH,
        num_warps=8,
    )  # fmt: skip
    output.output_kernel[(group_tiles, splits)](
        value, call.alpha_tensor, call.visible, stored, maxima, origin, level, pending, tile_lists, key_lists,
        parts, counts, sums, arrived, out,
        call.excess,
        *value.stride()[:3], *call.visible_strides, *out.stride()[:3],
        *sizes, head_dim,
        **constants, **wide,
        BLOCK_M=block,
        ROWS=existing,
        TILE=TILE,
        SCAN=min(output.SCAN, output.AT_ONCE // existing),
        TILES=max(1, output.AT_ONCE // (existing * TILE)),
        PARTS=max(1, output.AT_ONCE // (existing * call.block_dim)),
        **{**launch, "num_stages": 2},
    )  # fmt: skip
    return out, tau


def launch_of(element_size, block_dim, block):
    """Warps and pipeline depth for a tile of keys of this width: three tiles in flight where they fit."""
    tile_bytes = TILE * block_dim * element_size
    return {
        "num_warps": 8 if block * block_dim >= 64 * 128 else 4,
        "num_stages": 3 if tile_bytes <= 32768 else 2,
    }
