"""A row of scores -> the point of the simplex that alpha-entmax gives it.

Peters, Niculae, Martins 2019 (arXiv 1905.05702); gradient in alpha: Correia, Niculae, Martins 2019 (arXiv 1909.00015).
"""

import math

import torch
from torch.autograd.function import once_differentiable

from .threshold import Curve, check_alpha, find_level, sorted_level


def entmax(scores: torch.Tensor, alpha: float | torch.Tensor = 1.5, dim: int = -1) -> torch.Tensor:
    """p = [(alpha-1) scores - tau]_+ ^ (1/(alpha-1)) along dim, tau the number that makes the weights sum to one.

    alpha = 1 is softmax, 1.5 the usual choice, 2 sparsemax; below the threshold a weight is exactly zero. A score of
    -inf has weight zero, and a row of nothing else is zero with a zero gradient.

    scores: any shape, floating-point; half precision is computed in float32 and cast once.
    alpha: a number >= 1, or a floating tensor that broadcasts to scores with dim reduced to 1; it may need a gradient,
    which at exactly 1 is the limit from above.
    Raises TypeError for scores or alpha of a wrong type, ValueError for an alpha below 1 or NaN.
    """
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise TypeError(f"scores are {found}; entmax takes a floating-point tensor")
    alpha = check_alpha(alpha)
    if scores.dim() == 0:
        return entmax(scores.unsqueeze(0), alpha, 0).squeeze(0)
    if scores.numel() == 0:
        return scores.clone()
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if isinstance(alpha, torch.Tensor):
        reduced = list(scores.shape)
        reduced[dim] = 1
        if alpha.device != scores.device and alpha.dim() > 0:
            raise ValueError(f"alpha is on {alpha.device} and scores are on {scores.device}")
        try:
            alpha = alpha.to(scores.device, dtype).broadcast_to(reduced).movedim(dim, -1)
        except RuntimeError:
            raise ValueError(
                f"alpha of shape {tuple(alpha.shape)} does not broadcast to {tuple(reduced)}, "
                f"the scores with dim {dim} reduced to 1"
            ) from None
    weights = _Entmax.apply(scores.to(dtype).movedim(dim, -1), alpha)
    return weights.movedim(-1, dim).to(scores.dtype)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, alpha):
        curve = Curve.of(alpha, scores.dtype)
        scaled = scores * curve.factor
        if curve.kind in ("square", "linear"):
            highest = scaled.amax(-1, keepdim=True)
            empty = highest == -math.inf
            level = sorted_level(scaled, curve, highest.masked_fill(empty, 0)).masked_fill_(empty, math.inf)
        else:
            level = find_level(scaled, curve)
        ctx.save_for_backward(scores, level)
        ctx.curve = curve
        return curve.weights(scaled, level)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        scores, level = ctx.saved_tensors
        scaled = scores * ctx.curve.factor
        weight, slope = ctx.curve.weights(scaled, level)
        gradient = centered(gradient, slope)
        alpha_gradient = None
        if ctx.needs_input_grad[1]:
            slopes = ctx.curve.alpha_slopes(scaled, level, weight, slope)
            alpha_gradient = (slopes * gradient).sum(-1, keepdim=True)
        return slope * gradient, alpha_gradient


def centered(gradient: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """gradient less its mean under the slopes; the sum of no slopes, an empty row, counts as one."""
    slope_sum = slope.sum(-1, keepdim=True)
    mean = (gradient * slope).sum(-1, keepdim=True) / slope_sum.masked_fill_(slope_sum == 0, 1)
    return gradient - mean
