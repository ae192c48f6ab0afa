"""Query, key and structure -> blocks of scaled scores, one block of queries and the keys it can see at a time.

Nothing of size queries x keys is ever held. Shapes: B batch, H heads, G key heads, R heads per key head, N queries,
K keys, D head dim, E value dim; a tile has b, g, n and k of them.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch

from ..visible import visible_range
from .threshold import Curve, check_alpha

# Scores per tile: the few buffers of one tile stay in a CPU's cache, and keep a GPU busy.
TILE_SCORES = {"cpu": 2**19, "other": 2**24}
QUERY_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """Slices of the batch, the key heads, the queries and the keys; every query of it sees all the open keys."""

    batch: slice
    key_heads: slice
    queries: slice
    keys: slice
    open_keys: slice

    def query_rows(self, x_BGRNx: torch.Tensor) -> torch.Tensor:
        """The tile's part of a tensor with one entry per query, a view (b, g, R, n, ...)."""
        return x_BGRNx[self.batch, self.key_heads, :, self.queries]

    def batch_of(self, x_B: torch.Tensor) -> slice:
        """The rows of a tensor whose batch may be one for all."""
        return self.batch if len(x_B) > 1 else slice(None)

    def key_columns(self, x_BGxK: torch.Tensor) -> torch.Tensor:
        """The tile's part of a tensor laid out with the keys last, a view (b, g, ..., k)."""
        return x_BGxK[self.batch, self.key_heads, :, self.keys]


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is not the content of query and key, checked: which keys a query sees, the bias, the scaling, alpha."""

    heads: int
    key_heads: int
    scaling: float
    alpha: float | torch.Tensor
    visible_BN2: torch.Tensor
    slopes_H: torch.Tensor | None
    mask_BHNK: torch.Tensor | None

    def curve(self, dtype: torch.dtype) -> Curve:
        if isinstance(self.alpha, torch.Tensor):
            return Curve.of(self.alpha.view(self.key_heads, -1, 1, 1), dtype)
        return Curve.of(self.alpha, dtype)


def check(query, key, value=None, *, alpha, scaling, causal, visible, slopes, mask) -> Structure:
    """The Structure of a call, or a ValueError or TypeError that names what is wrong."""
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is {found}; it is a floating-point tensor")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it has (batch, heads, length, dim)")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}")
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise ValueError(f"{name} is {tensor.dtype} and query {query.dtype}; outside autocast they are the same")
    batch, heads, queries, dim = query.shape
    key_heads, keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"key has shape {tuple(key.shape)}, query {tuple(query.shape)}: batch and dim are the same")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value has shape {tuple(value.shape)}, key {tuple(key.shape)}: batch, heads, keys are the same"
        )

    alpha = check_alpha(alpha)
    if isinstance(alpha, torch.Tensor):
        if alpha.dim() == 0:
            alpha = alpha.expand(heads)
        if alpha.shape != (heads,):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; a tensor alpha is (heads,) = ({heads},)")
        alpha = alpha.to(query.device)
    if slopes is not None:
        slopes = _check_slopes(slopes, heads, query.device)
        if visible is None and not causal:
            raise ValueError("slopes with causal=False need visible: the distance is measured back from its end")
    if visible is None:
        visible = visible_range(queries, keys, causal=causal, device=query.device)
    else:
        visible = _check_visible(visible, batch, queries, query.device)
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"mask is {getattr(mask, 'dtype', type(mask).__name__)}; it is a bool tensor, True = visible"
            )
        if mask.device != query.device:
            raise ValueError(f"mask is on {mask.device} and query on {query.device}")
        try:
            mask = mask.expand(batch, heads, queries, keys)
        except RuntimeError:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; it broadcasts to (batch, heads, queries, keys) = "
                f"{(batch, heads, queries, keys)}"
            ) from None
    if scaling is None:
        scaling = dim**-0.5
    return Structure(heads, key_heads, float(scaling), alpha, visible.long().clamp(0, keys), slopes, mask)


def _check_slopes(slopes, heads: int, device: torch.device) -> torch.Tensor:
    if not isinstance(slopes, torch.Tensor) or not slopes.is_floating_point():
        raise TypeError(f"slopes is {getattr(slopes, 'dtype', type(slopes).__name__)}; it is a floating-point tensor")
    if slopes.shape != (heads,):
        raise ValueError(f"slopes has shape {tuple(slopes.shape)}; it is (heads,) = ({heads},)")
    if slopes.requires_grad:
        raise ValueError("slopes requires a gradient, which attention does not compute: detach it")
    return slopes.to(device)


def _check_visible(visible, batch: int, queries: int, device: torch.device) -> torch.Tensor:
    if not isinstance(visible, torch.Tensor) or visible.dtype not in (torch.int32, torch.int64):
        found = getattr(visible, "dtype", type(visible).__name__)
        raise TypeError(f"visible is {found}; it is an int32 or int64 tensor of key ranges")
    if visible.shape not in ((batch, queries, 2), (1, queries, 2)):
        raise ValueError(
            f"visible has shape {tuple(visible.shape)}; it is (batch or 1, queries, 2) = ({batch} or 1, {queries}, 2)"
        )
    if visible.device != device:
        raise ValueError(f"visible is on {visible.device} and query on {device}")
    return visible


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def tiles(structure: Structure, batch: int, keys: int, *, align: int = 1) -> Iterator[Tile]:
    """Tiles that cover every query that sees a key, each with the keys from the first to the last one it sees.

    align: query and key blocks start at multiples of it.
    """
    visible = structure.visible_BN2
    queries = visible.shape[1]
    if 0 in (batch, keys, queries):
        return
    budget = TILE_SCORES.get(visible.device.type, TILE_SCORES["other"])
    per_query = keys * structure.heads // structure.key_heads
    block = QUERY_BLOCK
    if visible.device.type != "cpu":
        block = max(block, budget // (per_query * structure.key_heads * batch))
    # In blocks of very few queries the keys' gradients, added up once per tile, would cost more than the scores.
    block = min(max(16, min(block, 4 * budget // per_query)), queries)
    block = -(-block // align) * align
    at_once = max(1, budget // (per_query * block))
    head_step = min(at_once, structure.key_heads)
    batch_step = max(1, at_once // structure.key_heads)
    extents = _extents(visible, keys, block)
    for first in range(0, batch, batch_step):
        rows = slice(first, min(first + batch_step, batch))
        own = extents[rows] if len(extents) > 1 else extents
        lowest, highest = own.amin(0).tolist(), own.amax(0).tolist()
        for index, ((start, _, _, open_end), (_, open_start, end, _)) in enumerate(zip(lowest, highest, strict=True)):
            if start >= end:
                continue
            for head in range(0, structure.key_heads, head_step):
                yield Tile(
                    batch=rows,
                    key_heads=slice(head, min(head + head_step, structure.key_heads)),
                    queries=slice(index * block, min((index + 1) * block, queries)),
                    keys=slice(start // align * align, end),
                    open_keys=slice(open_start, max(open_start, open_end)),
                )


def _extents(visible_BN2: torch.Tensor, keys: int, block: int) -> torch.Tensor:
    """First start, last start, last end and first end of each block of queries, on the CPU (batch or 1, blocks, 4)."""
    # One copy to the host for all tiles. A query that sees no key counts as [keys, 0), which widens no tile.
    start, end = visible_BN2.cpu().unbind(-1)
    empty = start >= end
    queries = start.shape[1]
    padded = torch.arange(-(-queries // block) * block).clamp_(max=queries - 1)
    start = start.masked_fill(empty, keys)[:, padded].unflatten(1, (-1, block))
    end = end.masked_fill(empty, 0)[:, padded].unflatten(1, (-1, block))
    return torch.stack((start.amin(-1), start.amax(-1), end.amax(-1), end.amin(-1)), dim=-1)


def scaled_scores(structure: Structure, tile: Tile, query_BGRND, key_BGDK, factor) -> torch.Tensor:
    """factor * scores of a tile (b, g, R, n, k), -inf where a key is not visible. query is scaled already."""
    query_bgrnd = tile.query_rows(query_BGRND)
    scaled = (query_bgrnd * _of_heads(factor, tile)).flatten(2, 3) @ tile.key_columns(key_BGDK)
    scaled = scaled.unflatten(2, query_bgrnd.shape[2:4])
    start_bn, end_bn = structure.visible_BN2[tile.batch_of(structure.visible_BN2), tile.queries].unbind(-1)
    start, end = start_bn[:, None, None, :, None], end_bn[:, None, None, :, None]
    position = torch.arange(tile.keys.start, tile.keys.stop, device=scaled.device)
    if structure.slopes_H is not None:
        # The distance is exact as an integer; slope * key less slope * query would lose digits at long range.
        distance = (position - end + 1).to(scaled.dtype)
        slopes = structure.slopes_H.to(scaled.dtype).view(structure.key_heads, -1, 1, 1)
        scaled.addcmul_(distance, _of_heads(slopes * factor, tile))
    left, right = tile.open_keys.start - tile.keys.start, tile.open_keys.stop - tile.keys.start
    if left > 0:
        scaled[..., :left].masked_fill_((position < start)[..., :left] | (position >= end)[..., :left], -math.inf)
    if right < len(position):
        scaled[..., right:].masked_fill_((position < start)[..., right:] | (position >= end)[..., right:], -math.inf)
    if structure.mask_BHNK is not None:
        mask = tile.query_rows(structure.mask_BHNK.unflatten(1, (structure.key_heads, -1)))[..., tile.keys]
        scaled.masked_fill_(~mask, -math.inf)
    return scaled


def _of_heads(x, tile: Tile):
    """A number, or the tile's part of a tensor (key heads, heads per key head, 1, 1)."""
    return x[tile.key_heads] if isinstance(x, torch.Tensor) else x
