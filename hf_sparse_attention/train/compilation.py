"""What `--compile` compiles: a decoder layer, whose graph serves all of them, and the loss of a chunk. A model leaves
as it was, but for those calls; nothing that changes from step to step is compiled anew."""

from __future__ import annotations

import torch
from torch import nn

from ..models import attention_layers
from .head import ChunkedLoss

BACKEND = "inductor"


def compile_parts(model: nn.Module, **options) -> None:
    """Compiles the decoder layers in place, before the model is spread over processes, and its loss in chunks.

    Args:
        options: of torch.compile, such as fullgraph.

    Raises:
        ValueError: for a model that does not say what its decoder layers are called.
    """
    distillation = getattr(model, "distillation", None)
    for each in [model, *([] if distillation is None else [distillation.teacher])]:
        names = set(getattr(each, "_no_split_modules", None) or [])
        layers = [module for module in each.modules() if type(module).__name__ in names]
        if not layers:
            raise ValueError(f"compile finds no decoder layers in {type(each).__name__}: leave it out")
        for layer in layers:
            layer.compile(dynamic=False, **{"backend": BACKEND, **options})
    for module in model.modules():
        # With adapters it is a module inside.
        if isinstance(module, ChunkedLoss):
            # The last chunk of a batch may be shorter than the others.
            module._chunk_loss = torch.compile(module._chunk_loss, **{"backend": BACKEND, **options})


def hold_rising_alpha(model: nn.Module, alpha: float) -> None:
    """Lets the sparse layers read alpha from a tensor: as a number, each of its values would be compiled anew.

    1 and the alpha at the end stay numbers, for which there are faster ways; `set_alpha` makes it one again.
    """
    for _, module in attention_layers(model):
        heads = module.config.num_attention_heads if module.sparse_heads is None else len(module.sparse_heads)
        module.alpha = torch.full((heads,), alpha, device=next(module.parameters()).device)
