"""The table of supported families: one row per decoder of Transformers whose attention goes through its
AttentionInterface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import transformers
from torch import nn


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

    @property
    def folder(self) -> str:
        return self.module or self.name

    def class_prefix(self, kind: str) -> str:
        """What the name of the sparse class of a kind starts with, after `Sparse`."""
        return (self.inner or self.prefix) if kind in ("Config", "Model") else self.prefix

    def dense_name(self, kind: str) -> str:
        """The name of the family's own class of a kind ("Config", "Attention", "Model", "ForCausalLM", ...)."""
        of_inner = kind in ("Config", "Model", "ForSequenceClassification")
        return ((self.inner or self.prefix) if of_inner else self.prefix) + kind

    def dense_module(self, kind: str) -> str:
        """The module of Transformers the class of a kind is defined in."""
        file = "configuration" if kind == "Config" else "modeling"
        return f"transformers.models.{self.folder}.{file}_{self.folder}"

    def dense(self, kind: str) -> type | None:
        """The family's own class of a kind, or None. Imports its module."""
        return getattr(importlib.import_module(self.dense_module(kind)), self.dense_name(kind), None)

    def source(self) -> str:
        """The text of the family's models in the installed Transformers, empty if it has none. Imports nothing."""
        file = Path(transformers.__file__).parent / "models" / self.folder / f"modeling_{self.folder}.py"
        return file.read_text(encoding="utf-8") if file.is_file() else ""


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

# The rows the installed Transformers has; filled by registration.py.
FAMILIES: dict[str, Family] = {}
