"""The attention that is timed: the kernels on a GPU, the reference where there is none. It never falls back."""

from __future__ import annotations

import torch

from .. import reference


def attend(query, key, value, **arguments) -> torch.Tensor:
    """The output of `reference.attention`, whose keyword arguments it takes."""
    return attend_with_tau(query, key, value, **arguments)[0]


def attend_with_tau(query, key, value, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, and tau."""
    if not query.is_cuda:
        return reference.attention(query, key, value, **arguments)
    from ..kernels import entmax_attention

    return entmax_attention(query, key, value, **arguments)


def outputs(attention, tensors, gradient) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, where `gradient` is that of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest ||found - expected|| / ||expected|| of several tensors; NaN where one is not finite.

    Raises:
        RuntimeError: where a tensor that is found is not finite.
    """
    errors = []
    for one, other in zip(found, expected, strict=True):
        if not bool(torch.isfinite(one).all()):
            raise RuntimeError("values are not finite: what was measured is worth nothing")
        errors.append(((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)).item())
    return max(errors)


def tolerance(dtype: torch.dtype) -> float:
    """What `difference` may be between two ways of computing the same; float32 may be multiplied as TF32."""
    return max(4 * torch.finfo(dtype).eps, 1e-3)
