"""Gradients of matrices -> updates with singular values of about 1: Muon (Jordan et al. 2024, with the scale of Liu et
al. 2025, arXiv 2502.16982).

The same numbers as `torch.optim.Muon`, which cannot be captured in a CUDA graph (its rate is a number of the host) and
launches fifteen products for every matrix; here all matrices of a shape go together."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

# x -> a x + b x^3 + c x^5 drives singular values towards 1: the coefficients and steps of Jordan et al.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
# An update has the root mean square of a usual one of AdamW, so that a rate serves both.
_SIZE = 0.2


def layer_matrices(model: nn.Module, new_names: set[str]) -> list[nn.Parameter]:
    """What Muon is for: trainable matrices that are neither embeddings, output head nor a map's own parameters."""
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return [
        parameter for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and name not in new_names and id(parameter) not in outside
    ]  # fmt: skip


def orthogonal(matrices_NAB: torch.Tensor) -> torch.Tensor:
    """Matrices (N, A, B), A <= B, with the same singular vectors and singular values of about 1 (0.7 to 1.2), in
    bfloat16."""
    x = matrices_NAB.bfloat16()
    # The Frobenius norm bounds the spectral one, which the iteration needs to be at most 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def _lying(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or its transpose if that has fewer rows."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov's), made orthogonal, times `0.2 sqrt(max(A, B))` times the rate.

    Args:
        params: matrices.
        lr: the rate, a number or a tensor of one, which is read anew in every step.
        momentum: share of the earlier gradients in the buffer.
        weight_decay: share of a matrix, times the rate, that a step takes away.

    Raises:
        ValueError: for a parameter that is no matrix.
    """

    def __init__(self, params, *, lr: float | torch.Tensor, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices; a parameter has the shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(sorted(parameter.shape))].append(parameter)
            for parameters in by_shape.values():
                self._step(group, parameters)

    def _step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        momentum, rate = group["momentum"], group["lr"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        wide = [_lying(item) for item in torch._foreach_lerp(gradients, buffers, momentum)]
        update = orthogonal(torch.stack(wide))
        update = update.to(parameters[0].dtype) * (_SIZE * update.shape[2] ** 0.5 * rate)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_sub_([_lying(parameter) for parameter in parameters], list(update.unbind()))
