"""Query, key and tau -> the weights tile by tile, how many keys carry weight, and which blocks are not all zero."""

import math
from collections.abc import Iterator

import torch

from .tiles import Tile, check, compute_dtype, scaled_scores, tiles


def support_size(
    query: torch.Tensor,
    key: torch.Tensor,
    tau: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.5,
    scaling: float | None = None,
    causal: bool = True,
    visible: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Number of keys with a nonzero weight, int32 (batch, heads, queries). tau is attention()'s, the rest as there."""
    structure = check(
        query, key, alpha=alpha, scaling=scaling, causal=causal, visible=visible, slopes=slopes, mask=mask
    )
    sizes = torch.zeros(query.shape[:3], dtype=torch.int32, device=query.device)
    grouped = sizes.unflatten(1, (structure.key_heads, -1))
    for tile, weights in _weights_of(structure, query, key, tau):
        tile.query_rows(grouped).copy_((weights > 0).sum(-1))
    return sizes


def block_occupancy(
    query: torch.Tensor,
    key: torch.Tensor,
    tau: torch.Tensor,
    *,
    block: int = 64,
    alpha: float | torch.Tensor = 1.5,
    scaling: float | None = None,
    causal: bool = True,
    visible: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whether any weight of a block x block square is nonzero, bool (batch, heads, query blocks, key blocks).

    Blocks are counted from query 0 and key 0; the last ones may be smaller.
    """
    if block < 1:
        raise ValueError(f"block={block}: a block has at least one query and key")
    structure = check(
        query, key, alpha=alpha, scaling=scaling, causal=causal, visible=visible, slopes=slopes, mask=mask
    )
    query_blocks, key_blocks = -(-query.shape[2] // block), -(-key.shape[2] // block)
    occupied = torch.zeros(*query.shape[:2], query_blocks, key_blocks, dtype=torch.bool, device=query.device)
    grouped = occupied.unflatten(1, (structure.key_heads, -1))
    for tile, weights in _weights_of(structure, query, key, tau, align=block):
        nonzero = weights > 0
        queries, keys = nonzero.shape[-2:]
        padded = torch.nn.functional.pad(nonzero, (0, -keys % block, 0, -queries % block))
        squares = padded.unflatten(-1, (-1, block)).any(-1).unflatten(-2, (-1, block)).any(-2)
        first = tile.queries.start // block, tile.keys.start // block
        grouped[
            tile.batch,
            tile.key_heads,
            :,
            first[0] : first[0] + squares.shape[-2],
            first[1] : first[1] + squares.shape[-1],
        ] = squares
    return occupied


def weight_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    tau: torch.Tensor,
    *,
    align: int = 1,
    alpha: float | torch.Tensor = 1.5,
    scaling: float | None = None,
    causal: bool = True,
    visible: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Iterator[tuple[Tile, torch.Tensor]]:
    """The weights of attention(), never more than a tile of them at once: (tile, weights (b, g, R, n, k)).

    A tile has every key its queries see, and starts at multiples of `align`; queries that see no key are in none.
    """
    structure = check(
        query, key, alpha=alpha, scaling=scaling, causal=causal, visible=visible, slopes=slopes, mask=mask
    )
    return _weights_of(structure, query, key, tau, align=align)


def _weights_of(structure, query, key, tau, *, align: int = 1) -> Iterator[tuple[Tile, torch.Tensor]]:
    if tau.shape != query.shape[:3]:
        raise ValueError(f"tau has shape {tuple(tau.shape)}; it is (batch, heads, queries) = {tuple(query.shape[:3])}")
    dtype = compute_dtype(query)
    curve = structure.curve(dtype)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        query_BGRND = query.to(dtype).unflatten(1, (structure.key_heads, -1)) * structure.scaling
        key_BGDK = key.to(dtype).mT.contiguous()
        level_BGRN1 = curve.level(tau.to(dtype).unflatten(1, (structure.key_heads, -1)).unsqueeze(-1))
        for tile in tiles(structure, len(query), key.shape[2], align=align):
            scaled = scaled_scores(structure, tile, query_BGRND, key_BGDK, curve.factor)
            of_tile = curve.of_heads(tile.key_heads)
            weights = of_tile.weights(scaled, tile.query_rows(level_BGRN1))[0]
            softmax = of_tile.kind == "softmax" if of_tile.exactly_one is None else of_tile.exactly_one
            if softmax is not False:
                # Softmax gives weight to every key it sees, even where a float rounds it to 0.
                least = weights.clamp(min=torch.finfo(dtype).tiny)
                weights = torch.where((scaled > -math.inf) & softmax, least, weights)
            yield tile, weights
