"""Query, key, value -> attention with alpha-entmax weights and its threshold, tile by tile; and the weights alone.

B batch, H heads, G key heads, R heads per key head, N queries, K keys, D head dim, E value dim; small letters: a tile.
The backward recomputes the weights from the saved threshold and applies their Jacobian diag(u) - u u^T / sum(u).
"""

import math

import torch
from torch.autograd.function import once_differentiable

from .simplex import centered, entmax
from .threshold import find_level
from .tiles import Structure, check, compute_dtype, scaled_scores, tiles


# The number of steps depends on the data: under torch.compile one clean graph break instead of one in every loop.
@torch.compiler.disable
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.5,
    scaling: float | None = None,
    causal: bool = True,
    visible: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_i = sum_j p_ij value_j with p_ij = [(alpha-1) score_ij - tau_i]_+ ^ (1/(alpha-1)).

    score_ij = scaling * query_i . key_j - slope_h * (end_i - 1 - j). The last query is aligned with the last key:

        queries 2, keys 5      x x x x .
                               x x x x x

    query (batch, heads, queries, dim); key, value (batch, key_heads, keys, dim), heads a multiple of key_heads.
    alpha: a number >= 1 (1 is softmax), or a tensor (heads,), which may require a gradient.
    scaling: default dim**-0.5.
    visible: int (batch or 1, queries, 2), the half-open range of keys each query may see; replaces causal.
    slopes: (heads,) ALiBi slopes >= 0, the distance measured back from the last visible key.
    mask: bool, broadcasts to (batch, heads, queries, keys), True = visible, on top of visible or causal.

    Returns out (batch, heads, queries, dim) in query's dtype, and tau (batch, heads, queries), float32 (float64 for
    float64), not differentiable; logsumexp where alpha is 1. A query that sees no key: out 0, tau inf, gradients 0.
    Computed in float32 whatever the input, also under autocast, and cast once.
    """
    structure = check(
        query, key, value, alpha=alpha, scaling=scaling, causal=causal, visible=visible, slopes=slopes, mask=mask
    )
    dtype = compute_dtype(query)
    alphas = structure.alpha if isinstance(structure.alpha, torch.Tensor) else None
    with torch.autocast(query.device.type, enabled=False):
        out, tau = _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), alphas, structure)
        return out.to(query.dtype), tau


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_BHND, key_BGKD, value_BGKE, alpha_H, structure: Structure):
        curve = structure.curve(query_BHND.dtype)
        batch, keys = key_BGKD.shape[0], key_BGKD.shape[2]
        query_BGRND, key_BGDK, value_BGEK = _layout(query_BHND, key_BGKD, value_BGKE, structure)
        out_BGRNE = query_BGRND.new_zeros(*query_BGRND.shape[:4], value_BGKE.shape[-1])
        level_BGRN = query_BGRND.new_full(query_BGRND.shape[:4], math.inf)
        for tile in tiles(structure, batch, keys):
            of_tile = curve.of_heads(tile.key_heads)
            scaled = scaled_scores(structure, tile, query_BGRND, key_BGDK, curve.factor)
            level = find_level(scaled, of_tile)
            weight, _ = of_tile.weights(scaled, level)
            # Products whose result is narrow are taken transposed: several times faster on a CPU for small head dims.
            out_bgerN = tile.key_columns(value_BGEK) @ weight.flatten(2, 3).mT
            tile.query_rows(out_BGRNE).copy_(out_bgerN.mT.unflatten(2, weight.shape[2:4]))
            tile.query_rows(level_BGRN).copy_(level.squeeze(-1))
        ctx.save_for_backward(query_BHND, key_BGKD, value_BGKE, level_BGRN)
        ctx.structure, ctx.curve = structure, curve
        tau_BHN = curve.tau(level_BGRN.unsqueeze(-1)).squeeze(-1).flatten(1, 2)
        ctx.mark_non_differentiable(tau_BHN)
        return out_BGRNE.flatten(1, 2), tau_BHN

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient_BHNE, _):
        with torch.autocast(out_gradient_BHNE.device.type, enabled=False):
            return _Attention.gradients(ctx, out_gradient_BHNE)

    @staticmethod
    def gradients(ctx, out_gradient_BHNE):
        structure, curve = ctx.structure, ctx.curve
        query_BHND, key_BGKD, value_BGKE, level_BGRN = ctx.saved_tensors
        query_BGRND, key_BGDK, value_BGEK = _layout(query_BHND, key_BGKD, value_BGKE, structure)
        gradient_BGRNE = out_gradient_BHNE.unflatten(1, (structure.key_heads, -1))
        query_gradient = torch.zeros_like(query_BGRND)
        key_gradient, value_gradient = torch.zeros_like(key_BGDK), torch.zeros_like(value_BGEK)
        alpha_gradient = query_BGRND.new_zeros(query_BGRND.shape[1:3]) if ctx.needs_input_grad[3] else None
        for tile in tiles(structure, len(key_BGDK), key_BGDK.shape[-1]):
            of_tile = curve.of_heads(tile.key_heads)
            scaled = scaled_scores(structure, tile, query_BGRND, key_BGDK, curve.factor)
            level = tile.query_rows(level_BGRN).unsqueeze(-1)
            weight, slope = of_tile.weights(scaled, level)
            out_gradient = tile.query_rows(gradient_BGRNE).flatten(2, 3)
            tile.key_columns(value_gradient).add_(out_gradient.mT @ weight.flatten(2, 3))
            weight_gradient = (out_gradient @ tile.key_columns(value_BGEK)).unflatten(2, weight.shape[2:4])
            weight_gradient = centered(weight_gradient, slope)
            if alpha_gradient is not None:
                slopes = of_tile.alpha_slopes(scaled, level, weight, slope).mul_(weight_gradient)
                alpha_gradient[tile.key_heads] += slopes.sum((0, 3, 4))
            score_gradient = weight_gradient.mul_(slope).flatten(2, 3)
            query_part = tile.key_columns(key_BGDK) @ score_gradient.mT
            tile.query_rows(query_gradient).copy_(query_part.mT.unflatten(2, weight.shape[2:4]))
            tile.key_columns(key_gradient).add_(tile.query_rows(query_BGRND).flatten(2, 3).mT @ score_gradient)
        query_gradient.mul_(structure.scaling)
        if alpha_gradient is not None:
            alpha_gradient = alpha_gradient.flatten().to(structure.alpha.dtype)
        return query_gradient.reshape(query_BHND.shape), key_gradient.mT, value_gradient.mT, alpha_gradient, None


def _layout(query_BHND, key_BGKD, value_BGKE, structure: Structure):
    """Scaled queries by key head, keys and values with the keys last, contiguous."""
    query_BGRND = query_BHND.unflatten(1, (structure.key_heads, -1)) * structure.scaling
    return query_BGRND.contiguous(), key_BGKD.mT.contiguous(), value_BGKE.mT.contiguous()


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.5,
    scaling: float | None = None,
    causal: bool = True,
    visible: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights p (batch, heads, queries, keys) of attention() as one dense differentiable tensor, query's dtype."""
    structure = check(
        query, key, alpha=alpha, scaling=scaling, causal=causal, visible=visible, slopes=slopes, mask=mask
    )
    dtype = compute_dtype(query)
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.to(dtype).unflatten(1, (structure.key_heads, -1))
        scores = (grouped @ key.to(dtype).mT.unsqueeze(2)).flatten(1, 2) * structure.scaling
        start, end = structure.visible_BN2[:, None, :, :, None].unbind(3)
        position = torch.arange(key.shape[2], device=key.device)
        if structure.slopes_H is not None:
            scores = scores + structure.slopes_H.to(dtype).view(-1, 1, 1) * (position - end + 1)
        hidden = (position < start) | (position >= end)
        if structure.mask_BHNK is not None:
            hidden = hidden | ~structure.mask_BHNK
        alphas = structure.alpha.view(-1, 1, 1) if isinstance(structure.alpha, torch.Tensor) else structure.alpha
        return entmax(scores.masked_fill(hidden, -math.inf), alphas).to(query.dtype)
