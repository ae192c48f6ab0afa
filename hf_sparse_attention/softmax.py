"""Softmax attention on SDPA, in memory linear in the keys: what layers compute whose alpha is 1. Enter q, k, v, the
keys each query sees and ALiBi slopes; leaves the output."""

from __future__ import annotations

from math import ceil

import torch
from torch.nn import functional as F

from .heads import merge_heads, other_heads, take_heads, take_key_heads
from .visible import visible_range

# Shapes: B batch, H heads, G key heads, N queries, K keys, D head size.

# Entries of the masks that softmax with slopes or padding holds at a time; queries are taken in parts beyond.
_MASK_ENTRIES = 2**26
# Queries from which on heads with slopes read the near keys alone; below it costs more to ask which these are.
_NEAR_FROM = 2048
# exp of minus this is 0, in float64 and in all others, whose weights are computed in float32.
_NOTHING_DOUBLE, _NOTHING = 746.0, 104.0


def softmax_attention(query, key, value, *, scaling, causal, visible, slopes, mask):
    """Softmax over the same keys, on SDPA, in memory linear in them. A query that sees no key gives zeros."""
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    # Causal SDPA aligns the first query with the first key, the contract the last with the last.
    aligned = not causal or query.shape[2] == 1 or query.shape[2] == key.shape[2]
    if visible is None and mask is None and slopes is None and aligned:
        # A branch, not a comparison: with dynamic shapes that is a symbol, which SDPA does not take.
        is_causal = True if causal and query.shape[2] > 1 else False  # noqa: SIM210
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling, **grouped)
    from_last = visible is None and causal
    is_long = _NEAR_FROM < query.shape[2] <= key.shape[2]
    if slopes is not None and from_last and mask is None and is_long and not _is_fixed(query):
        return _with_slopes(query, key, value, scaling=scaling, slopes=slopes)
    if visible is None:
        visible = visible_range(query.shape[2], key.shape[2], causal=causal, device=query.device)
    queries, keys = query.shape[2], key.shape[2]
    masks = max(visible.shape[0], 1 if mask is None else mask.shape[0]) * (1 if slopes is None else len(slopes))
    step = queries if torch.compiler.is_compiling() else max(1, _MASK_ENTRIES // max(1, masks * keys))
    pieces = []
    for first in range(0, queries, step):
        part = slice(first, first + step)
        # Without a range the last query stands at the last key: keys after the last of these are not looked at.
        last = max(1, min(keys, keys - queries + first + step)) if from_last else keys
        pieces.append(
            _masked_softmax(
                query[:, :, part],
                key[:, :, :last],
                value[:, :, :last],
                scaling=scaling,
                visible=visible[:, part],
                slopes=slopes,
                mask=None if mask is None else mask[..., part, :last],
                grouped=grouped,
            )  # fmt: skip
        )
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _masked_softmax(query, key, value, *, scaling, visible, slopes, mask, grouped):
    """Softmax over the keys that each query sees, on SDPA with a mask of all queries times all keys."""
    start_B1N1, end_B1N1 = visible[:, None, :, None, 0], visible[:, None, :, None, 1]
    key_K = torch.arange(key.shape[2], device=query.device)
    seen = (key_K >= start_B1N1) & (key_K < end_B1N1)
    if mask is not None:
        seen = seen & mask
    empty = ~seen.any(-1, keepdim=True)
    # A row of -inf is NaN in some SDPA backends: let it see every key, and zero its output, hence its gradients.
    bias = seen | empty
    if slopes is not None:
        precise = torch.promote_types(query.dtype, torch.float32)
        penalty = slopes.to(precise)[:, None, None] * (key_K - (end_B1N1 - 1))
        bias = torch.where(bias, penalty, float("-inf")).to(query.dtype)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, **grouped)
    return output.masked_fill(empty, 0)


def _is_fixed(query: torch.Tensor) -> bool:
    """Whether what is computed may not depend on numbers: in a compiled function or a CUDA graph."""
    return torch.compiler.is_compiling() or (query.is_cuda and torch.cuda.is_current_stream_capturing())


def _with_slopes(query, key, value, *, scaling, slopes):
    """Causal softmax, the last query at the last key, where heads with a slope read only the keys within their reach.

    A query sees its own key, so the weight of one at distance d is at most exp(z_ij - z_ii - slope d), and |z| is at
    most scaling |q| |k|. Where that bound is 0 to the computer the key is left out: the output is the same.
    """
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    values_H = slopes.tolist()
    plain = tuple(head for head in range(heads) if values_H[head] == 0)
    steep = other_heads(plain, heads)

    def part(heads):
        return take_heads(query, heads), take_key_heads(key, heads, group), take_key_heads(value, heads, group)

    if not steep:
        return softmax_attention(query, key, value, scaling=scaling, causal=True, visible=None, slopes=None, mask=None)
    near = _near(*part(steep), scaling=scaling, slopes=torch.stack([slopes[head] for head in steep]))
    if not plain:
        return near
    whole = softmax_attention(*part(plain), scaling=scaling, causal=True, visible=None, slopes=None, mask=None)
    return merge_heads(near, whole, steep)


def _near(query, key, value, *, scaling, slopes):
    """`_with_slopes` of heads that all have one, in pieces of the queries."""
    queries, keys = query.shape[2], key.shape[2]
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    reach = _reach(query, key, scaling, slopes)
    # A query reads reach + step keys: with these steps at most twice those that are needed, but for short reaches.
    step = max(1, min(max(256, reach), _MASK_ENTRIES // (2 * len(slopes) * (reach + 1)), queries))
    # SDPA copies masks whose width is no multiple of 16.
    step = step // 64 * 64 or step
    visible = visible_range(queries, keys, device=query.device)
    pieces = []
    for first in range(0, queries, step):
        own = keys - queries + first
        begin, end = max(0, own - reach) // 64 * 64, min(keys, own + step)
        pieces.append(
            _masked_softmax(
                query[:, :, first : first + step],
                key[:, :, begin:end],
                value[:, :, begin:end],
                scaling=scaling,
                visible=(visible[:, first : first + step] - begin).clamp(min=0),
                slopes=slopes,
                mask=None,
                grouped=grouped,
            )
        )
    return torch.cat(pieces, dim=2)


@torch.no_grad()
def _reach(query, key, scaling, slopes) -> int:
    """Largest distance of a key that can have weight, over all heads; at most all keys."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    nothing = _NOTHING_DOUBLE if query.dtype == torch.float64 else _NOTHING
    query_H = query.float().norm(dim=-1).amax(dim=(0, 2))
    key_H = key.float().norm(dim=-1).amax(dim=(0, 2)).repeat_interleave(query.shape[1] // key.shape[1])
    # Scores and slopes are rounded where they are added: to 1/256 at most.
    reach = float((1.02 * (2 * abs(scaling) * query_H * key_H + nothing) / slopes.abs().float()).max())
    # NaN and infinity reach everywhere.
    return min(key.shape[2], ceil(reach)) if reach < key.shape[2] else key.shape[2]
