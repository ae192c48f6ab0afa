"""The passes of decoding in order, with their scratch: scores, tau and the output of few keys, the output of many.

No grid depends on the data and nothing waits for the device, so a CUDA graph can hold them."""

from typing import NamedTuple

import torch
import triton

from ..configurations import TILE, processors
from ..tiles import ENTMAX15
from . import output, scores, threshold
from .pages import REST, SEEDS, bounds_of_pages

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


class _Scores(NamedTuple):
    """What `scores.scores_kernel` leaves: scores of kept tiles, maxima of tiles and of classes of keys, what tau is at
    least, the tiles read where bounds of pages say so, and whether those helped."""

    stored: torch.Tensor
    maxima: torch.Tensor
    slots: torch.Tensor
    bound: torch.Tensor
    lists: torch.Tensor
    votes: torch.Tensor | None


def _scratch(call, group_tiles):
    """A function that makes tensors of these sizes for every row tile of every key head."""

    def scratch(*shape, dtype=torch.float32):
        return torch.empty((group_tiles, *shape), dtype=dtype, device=call.query.device)

    return scratch


def pages_read(call, pages):
    """How many of the pages a call reads, (row tiles of all key heads,)."""
    group_tiles, _, _, sizes = division(call)
    lists = _scratch(call, group_tiles)(sizes[3] + sizes[4], dtype=torch.int32).fill_(-1)
    _run_scores(call, pages, lists)
    return (lists >= 0).sum(1)


def _run_scores(call, pages, lists):
    query, key = call.query, call.key
    group_tiles, block, _, sizes = division(call)
    tiles, splits, _, rows = sizes[3:]
    existing = triton.next_power_of_2(rows)
    scratch = _scratch(call, group_tiles)
    stored, maxima, slots = scratch(tiles, rows, TILE), scratch(rows, tiles), scratch(splits, rows, TILE)
    bound = scratch(splits, rows)
    launch = launch_of(query.element_size(), call.block_dim, block)
    idle = votes = None
    # Without pages nothing reads the last three, but a kernel has no pointer to nothing.
    each, programs, best, chosen, seeds = max(1, SEEDS // existing), 1, bound, lists, lists
    if pages is not None:
        best, chosen = bounds_of_pages(call, pages, maxima, sizes, block, launch)
        idle, votes, programs = pages[3], scratch(splits, dtype=torch.int32), best.shape[2]
        seeds = scratch(splits, 1 + each * existing, dtype=torch.int32)
    scores.scores_kernel[(group_tiles, splits)](
        query, key, call.alpha_tensor, call.slopes, call.visible, call.mask, lists, votes, idle, bound,
        best, chosen, seeds,
        stored, maxima, slots,
        call.excess, call.scaling,
        *query.stride()[:3], *key.stride()[:3], *call.visible_strides, *call.mask_strides,
        *sizes, query.shape[-1], programs,
        **_constants(call), **_wide(call),
        HAS_SLOPES=call.constants["HAS_SLOPES"],
        HAS_MASK=call.constants["HAS_MASK"],
        HAS_LIST=pages is not None,
        HAS_IDLE=idle is not None,
        BLOCK_M=block,
        ROWS=existing,
        TILE=TILE,
        CHUNK_D=scores.CHUNK_D,
        SLACK=scores.SLACK,
        LEAST_TILES=scores.LEAST_TILES,
        STEPS=threshold.STEPS,
        SCAN=min(threshold.SCAN, output.AT_ONCE // existing),
        PROGRAMS=triton.next_power_of_2(programs),
        EACH=each,
        **launch,
    )  # fmt: skip
    return _Scores(stored, maxima, slots, bound, lists, votes)


def _constants(call):
    names = ("GROUP", "RANGE_KIND", "HAS_ALPHA")
    # Scores are kept in float32 whatever the input, and few: the exact functions cost nothing.
    return {name: call.constants[name] for name in names} | {"ALPHA_KIND": call.alpha_kind}


def _wide(call):
    return {name: call.constants[name] for name in ("BLOCK_D", "EVEN_D", "PRECISION")}


def run_passes(call, pages=None):
    """Output (B, H, N, D), laid out (B, N, H, D), and tau (B, H, N), +inf in rows that see no key.

    pages: None, or the bounds of the keys' pages, as `pages.bounds_of_pages` takes them.
    """
    query, value = call.query, call.value
    batch, heads, queries, head_dim = query.shape
    device = query.device
    group_tiles, block, most, sizes = division(call)
    tiles, splits, _, rows = sizes[3:]
    existing = triton.next_power_of_2(rows)
    scratch = _scratch(call, group_tiles)
    # Tiles and keys of every split, the last shares rounded up.
    tile_lists, key_lists = (scratch((tiles + splits) * size, dtype=torch.int32) for size in (1, TILE))
    stored, maxima, slots, bound, _, votes = _run_scores(call, pages, tile_lists)
    lists = scratch(rows, tiles, dtype=torch.int32)
    parts, sums = scratch(splits, rows, head_dim), scratch(splits, rows)
    counts, arrived = scratch(splits, dtype=torch.int32), scratch(dtype=torch.int32)
    found, pending = (scratch(rows, size, dtype=torch.int32) for size in (threshold.HELD * TILE, 1))
    origin, level = scratch(rows), scratch(rows)
    tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
    idle = None if pages is None else pages[3]
    threshold.threshold_kernel[(group_tiles * rows,)](
        value, call.alpha_tensor, call.visible, bound, votes, idle,
        stored, maxima, slots, lists, found, origin, level, pending, arrived, tau, out,
        call.excess,
        *value.stride()[:3], *call.visible_strides, *out.stride()[:3],
        *sizes, head_dim,
        **_constants(call),
        HAS_IDLE=idle is not None,
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
        num_warps=8,
    )  # fmt: skip
    output.output_kernel[(group_tiles, splits)](
        value, call.alpha_tensor, call.visible, stored, maxima, origin, level, pending, tile_lists, key_lists,
        parts, counts, sums, arrived, out,
        call.excess,
        *value.stride()[:3], *call.visible_strides, *out.stride()[:3],
        *sizes, head_dim,
        **_constants(call), **_wide(call),
        BLOCK_M=block,
        ROWS=existing,
        TILE=TILE,
        SCAN=min(output.SCAN, output.AT_ONCE // existing),
        TILES=max(1, output.AT_ONCE // (existing * TILE)),
        PARTS=max(1, output.AT_ONCE // (existing * call.block_dim)),
        **{**launch_of(query.element_size(), call.block_dim, block), "num_stages": 2},
    )  # fmt: skip
    return out, tau


def launch_of(element_size, block_dim, block):
    """Warps and pipeline depth for a tile of keys of this width: three tiles in flight where they fit."""
    tile_bytes = TILE * block_dim * element_size
    return {
        "num_warps": 8 if block * block_dim >= 64 * 128 else 4,
        "num_stages": 3 if tile_bytes <= 32768 else 2,
    }
