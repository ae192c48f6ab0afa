"""Sparse models: every supported family of Transformers with the attention its config says, and what commands ask of
a model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..config import SparseAttentionConfig
from .configuration import check_convertible, layer_window, sparse_config, sparse_layers
from .families import CLASSES, FAMILIES, REFUSED, Family, family_of, sparse_class
from .layers import SparseAttention
from .pretrained import new_parameter_names
from .registration import register
from .rope import with_rope

__all__ = [
    "CLASSES",
    "FAMILIES",
    "REFUSED",
    "Family",
    "attention_layers",
    "check_convertible",
    "family_of",
    "layer_window",
    "new_parameter_names",
    "register",
    "set_alpha",
    "sparse_class",
    "sparse_config",
    "sparse_layers",
    "with_rope",
]


def attention_layers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer number, attention module) of every layer whose attention is sparse."""
    found = [module for module in model.modules() if isinstance(module, SparseAttention) and module.is_sparse]
    return [(module.layer_idx, module) for module in found]


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Sets alpha of every sparse layer and of the config, which is what a checkpoint saves.

    Raises:
        ValueError: if the map does not take this alpha.
    """
    config = model.config
    settings = replace(SparseAttentionConfig.from_model_config(config), alpha=alpha)
    config.sparse_attention = settings.to_dict()
    for _, module in attention_layers(model):
        module.alpha = settings.alpha
