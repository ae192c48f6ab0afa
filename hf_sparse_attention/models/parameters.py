"""Which parameters of a model the dense one does not have."""

from __future__ import annotations

from torch import nn

from ..maps import NEW_MODULES


def new_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters the dense model does not have."""
    names = []
    for prefix, module in model.named_modules():
        if isinstance(module, NEW_MODULES):
            names += [f"{prefix}.{name}" for name, _ in module.named_parameters()]
    return names
