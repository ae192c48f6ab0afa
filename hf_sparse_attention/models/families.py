"""The table of supported families: one row per decoder of Transformers whose attention goes through its
AttentionInterface, and the sparse classes made of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`: a decoder of Transformers whose attention goes through the AttentionInterface.

    Args:
        name: the dense model_type; the sparse one is `sparse_` + name.
        prefix: what its class names start with, as in `LlamaAttention`, `LlamaForCausalLM`.
        module: folder below transformers.models, if it is not `name`.
        inner: prefix of the config and the inner model, if it is not `prefix`.
        rotates: whether an attention layer applies rotary positions.
    """

    name: str
    prefix: str
    module: str | None = None
    inner: str | None = None
    rotates: Callable[[nn.Module], bool] = lambda attention: True

    def dense(self, kind: str) -> type | None:
        """The family's own class of a kind ("Config", "Attention", "Model", "ForCausalLM", ...), or None."""
        prefix = self.inner or self.prefix
        folder = self.module or self.name
        if kind == "Config":
            module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        else:
            module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
            prefix = prefix if kind in ("Model", "ForSequenceClassification") else self.prefix
        return getattr(module, prefix + kind, None)


ROWS = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("mixtral", "Mixtral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family("qwen3_moe", "Qwen3Moe"),
    Family("olmo2", "Olmo2"),
    Family("olmo3", "Olmo3"),
    Family("smollm3", "SmolLM3", rotates=lambda attention: bool(attention.use_rope)),
    Family("granite", "Granite"),
    Family("phi3", "Phi3"),
    Family("gemma3_text", "Gemma3", module="gemma3", inner="Gemma3Text"),
    Family("cohere2", "Cohere2", rotates=lambda attention: attention.sliding_window is not None),
    Family("glm4", "Glm4"),
    Family("starcoder2", "Starcoder2"),
    Family("stablelm", "StableLm"),
    Family("nemotron", "Nemotron"),
    Family(
        "exaone4", "Exaone4", rotates=lambda attention: attention.sliding_window is None or bool(attention.is_sliding)
    ),
    Family("gpt_neox", "GPTNeoX"),
    Family("ernie4_5", "Ernie4_5"),
    Family("hunyuan_v1_dense", "HunYuanDenseV1"),
    Family("seed_oss", "SeedOss"),
    Family("arcee", "Arcee"),
)

# Families that need something the attention maps do not compute.
REFUSED = {
    "gemma2": "attention soft-capping",
    "gpt_oss": "attention sinks",
    "deepseek_v2": "its own head dimensions for keys and values",
    "deepseek_v3": "its own head dimensions for keys and values",
    "llama4_text": "chunked attention",
}

# The rows the installed Transformers has, and every class made of them by its name; filled by registration.py.
FAMILIES: dict[str, Family] = {}
CLASSES: dict[str, type] = {}


def sparse_class(family: Family, kind: str) -> type | None:
    """`SparseLlamaForCausalLM` and its like; None for a kind the dense family does not have."""
    return CLASSES.get(f"Sparse{class_prefix(family, kind)}{kind}")


def class_prefix(family: Family, kind: str) -> str:
    return (family.inner or family.prefix) if kind in ("Config", "Model") else family.prefix


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a sparse config."""
    return FAMILIES[config.model_type.removeprefix("sparse_")]
