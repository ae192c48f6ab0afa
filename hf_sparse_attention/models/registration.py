"""Makes the sparse classes of every family and registers them with the Auto classes."""

from __future__ import annotations

import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..config import SparseAttentionConfig
from ..maps import MAPS
from .configuration import SparseConfig, sparse_config
from .families import CLASSES, FAMILIES, ROWS, Family, class_prefix, sparse_class
from .layers import SparseAttention
from .pretrained import SparseModel, SparsePreTrainedModel

# The classes are found under the package that holds this file, which is where pickle looks for them.
PACKAGE = __name__.rpartition(".")[0]

_MIXINS = {
    "Config": SparseConfig,
    "Attention": SparseAttention,
    "Model": SparseModel,
    "ForCausalLM": SparsePreTrainedModel,
    "ForSequenceClassification": SparsePreTrainedModel,
}
_AUTO = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
}


def _dispatch(dense: type[PreTrainedModel], sparse: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """What an Auto class holds for a dense config: the dense class, but our names lead to the sparse one."""

    def requested(config, kwargs):
        return kwargs.get("attn_implementation") or config._attn_implementation

    def refuse_options(kwargs):
        if kwargs.pop("sparse_attention", None) is not None:
            raise ValueError(f"sparse_attention=... needs attn_implementation=, one of {', '.join(MAPS)}")

    @classmethod
    def from_pretrained(cls, path, *model_args, config=None, **kwargs):
        name = requested(config, kwargs)
        if name not in MAPS:
            refuse_options(kwargs)
            return dense.from_pretrained(path, *model_args, config=config, **kwargs)
        kwargs.pop("attn_implementation", None)
        options = kwargs.pop("sparse_attention", None)
        return sparse.from_pretrained(path, *model_args, config=_converted(config, name, options), **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        name = requested(config, kwargs)
        if name not in MAPS:
            refuse_options(kwargs)
            return dense._from_config(config, **kwargs)
        kwargs.pop("attn_implementation", None)
        return sparse._from_config(_converted(config, name, kwargs.pop("sparse_attention", None)), **kwargs)

    # The module stays the dense one's: Transformers takes a class from elsewhere for custom code, which would outrank
    # a checkpoint's own `trust_remote_code` class.
    body = {"from_pretrained": from_pretrained, "_from_config": _from_config, "__module__": dense.__module__}
    return type(dense.__name__, (dense,), body)


def _converted(config: PreTrainedConfig, name: str, options: dict | None) -> PreTrainedConfig:
    options = {"map": name, **(options or {})}
    if options["map"] != name:
        raise ValueError(f"attn_implementation is {name!r} but sparse_attention['map'] is {options['map']!r}")
    return sparse_config(config, SparseAttentionConfig.from_dict(options))


def _build(family: Family) -> None:
    """Makes and registers the classes of one family."""
    for kind, mixin in _MIXINS.items():
        dense = family.dense(kind)
        if dense is None:
            continue
        body = {"__module__": PACKAGE, "__doc__": f"{dense.__name__} with the attention its config says."}
        if kind == "Config":
            body["model_type"] = f"sparse_{family.name}"
        elif kind != "Attention":
            body["config_class"] = sparse_class(family, "Config")
        name = f"Sparse{class_prefix(family, kind)}{kind}"
        CLASSES[name] = type(name, (mixin, dense), body)
        setattr(sys.modules[PACKAGE], name, CLASSES[name])
    AutoConfig.register(f"sparse_{family.name}", sparse_class(family, "Config"))
    for kind, auto in _AUTO.items():
        sparse = sparse_class(family, kind)
        if sparse is not None:
            auto.register(sparse_class(family, "Config"), sparse)
            auto.register(family.dense("Config"), _dispatch(family.dense(kind), sparse), exist_ok=True)
    FAMILIES[family.name] = family


def register() -> None:
    """Makes the classes of every family the installed Transformers has, and tells the Auto classes."""
    for family in ROWS:
        try:
            family.dense("Config")
            module = sys.modules[family.dense("Attention").__module__]
        except ModuleNotFoundError:
            continue
        # Older releases run some families with attention of their own, past the AttentionInterface.
        if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
            continue
        _build(family)
