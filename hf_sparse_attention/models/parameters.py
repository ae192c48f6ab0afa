"""Which tensors of a checkpoint the dense model does not have, and which files of tensors are read at all."""

from __future__ import annotations

import re

from torch import nn

from ..maps import NEW_MODULES

# Modules whose parameters a map adds to a dense model, by their name in a checkpoint.
NEW_PARAMETER = re.compile(r"\.sparse_(scale|alpha)\.")
ONLY_SAFETENSORS = (
    "Only safetensors weights are loaded: a .bin file is a pickle, which can run code. Load the model where you trust "
    "it and write it with save_pretrained"
)


def new_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters the dense model does not have; of those PEFT keeps twice, the ones that are used."""
    names = []
    for prefix, module in model.named_modules():
        if isinstance(module, NEW_MODULES) and not prefix.endswith(".original_module"):
            names += [f"{prefix}.{name}" for name, _ in module.named_parameters()]
    return names
