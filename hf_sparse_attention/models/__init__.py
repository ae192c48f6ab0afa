"""Sparse models: every supported family of Transformers with the attention its config says, and what commands ask of
a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import SparseAttentionConfig
from .classes import CLASSES, class_named, family_of, sparse_class
from .configuration import check_convertible, dense_config, layer_window, sparse_config, sparse_heads, sparse_layers
from .families import FAMILIES, REFUSED, Family
from .parameters import NEW_PARAMETER, ONLY_SAFETENSORS, new_parameter_names
from .registration import register
from .remote_code import AUTO_CLASSES, MODULE, auto_map, module_source
from .rope import with_rope

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "AUTO_CLASSES",
    "CLASSES",
    "FAMILIES",
    "MODULE",
    "NEW_PARAMETER",
    "ONLY_SAFETENSORS",
    "REFUSED",
    "Family",
    "attention_layers",
    "auto_map",
    "check_convertible",
    "class_named",
    "dense_config",
    "family_of",
    "layer_window",
    "module_source",
    "new_parameter_names",
    "register",
    "set_alpha",
    "sparse_class",
    "sparse_config",
    "sparse_heads",
    "sparse_layers",
    "with_rope",
]


def __getattr__(name):
    # Pickle looks here for a class by its name.
    if name in CLASSES:
        return class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention_layers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer number, attention module) of every layer whose attention is sparse."""
    from .layers import SparseAttention

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
