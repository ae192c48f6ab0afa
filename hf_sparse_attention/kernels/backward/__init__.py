"""Gradients from the saved tau: dz = u * (g - delta), g = dout . v, delta = dout . (mean of the values under u).

The query gradient walks the tiles of each query tile, the key and value gradients those of each key tile, summed
over the query heads of the group inside one program: no atomics, the same bits every run.
"""

import torch

from ..configurations import TILE
from ..transposition import transpose
from .keys import add_queries, walk_keys
from .queries import walk_queries

__all__ = ["add_queries", "gradients"]


def gradients(call, grad_out, tau, mean, lists, alpha_gradient, strays=None):
    """dquery, dkey, dvalue in the inputs' dtype and, if asked for, dalpha (H,) in float32, else None."""
    query, key, value = call.query, call.key, call.value
    batch, heads, queries, head_dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    device = query.device
    dquery = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device).transpose(1, 2)
    dkey = torch.empty((batch, keys, groups, head_dim), dtype=key.dtype, device=device).transpose(1, 2)
    dvalue = torch.empty((batch, keys, groups, head_dim), dtype=value.dtype, device=device).transpose(1, 2)
    # tau and delta of every query side by side, as the key gradient reads them.
    pairs = torch.empty((batch, heads, call.query_tiles * TILE, 2), dtype=torch.float32, device=device)
    dalpha = torch.empty_like(tau) if alpha_gradient else None
    by_keys = transpose(call, lists, strays)
    walk_queries(call, grad_out, tau, mean, lists, strays, by_keys, pairs, dquery, dalpha)
    walk_keys(call, grad_out, by_keys, pairs, dkey, dvalue)
    if alpha_gradient:
        dalpha = dalpha.sum((0, 2))
    return dquery, dkey, dvalue, dalpha
