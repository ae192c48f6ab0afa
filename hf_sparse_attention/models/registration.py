"""Makes the sparse classes of every family and registers them with the Auto classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import tokenization_auto

from ..config import SparseAttentionConfig
from ..maps import MAPS
from .configuration import SparseConfig, sparse_config
from .families import CLASSES, FAMILIES, ROWS, Family, class_prefix, sparse_class
from .layers import SparseAttention
from .pretrained import SparseModel, SparsePreTrainedModel
from .remote_code import AUTO_CLASSES

# The classes are found under the package that holds this file, which is where pickle looks for them.
PACKAGE = __name__.rpartition(".")[0]

_MIXINS = {
    "Config": SparseConfig,
    "Attention": SparseAttention,
    "Model": SparseModel,
    "ForCausalLM": SparsePreTrainedModel,
    "ForSequenceClassification": SparsePreTrainedModel,
}


def _dispatch(dense: type[PreTrainedModel], sparse: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """What an Auto class holds for a dense config: the dense class, but our names lead to the sparse one."""

    def refuse_options(kwargs):
        if kwargs.pop("sparse_attention", None) is not None:
            raise ValueError(f"sparse_attention=... needs attn_implementation=, one of {', '.join(MAPS)}")

    @classmethod
    def from_pretrained(cls, path, *model_args, config=None, **kwargs):
        name = kwargs.get("attn_implementation") or config._attn_implementation
        _refuse_sparse_folder(path)
        _refuse_sparse_block(config)
        if name not in MAPS:
            refuse_options(kwargs)
            return dense.from_pretrained(path, *model_args, config=config, **kwargs)
        kwargs.pop("attn_implementation", None)
        options = kwargs.pop("sparse_attention", None)
        return sparse.from_pretrained(path, *model_args, config=_converted(config, name, options), **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        # Our name in the config alone comes from a dense class that makes its inner model. Were that one sparse, the
        # outer class would save it as a dense model; as it is, the first call is refused.
        name = kwargs.get("attn_implementation")
        _refuse_sparse_block(config)
        if name not in MAPS:
            refuse_options(kwargs)
            return dense._from_config(config, **kwargs)
        kwargs.pop("attn_implementation", None)
        return sparse._from_config(_converted(config, name, kwargs.pop("sparse_attention", None)), **kwargs)

    # The module stays the dense one's: Transformers takes a class from elsewhere for custom code, which would outrank
    # a checkpoint's own `trust_remote_code` class.
    body = {"from_pretrained": from_pretrained, "_from_config": _from_config, "__module__": dense.__module__}
    return type(dense.__name__, (dense,), body)


def _refuse_sparse_folder(path) -> None:
    """A sparse folder that is loaded with a dense config would run as softmax."""
    file = Path(str(path)) / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8")).get("model_type", "") if file.is_file() else ""
    if str(saved).removeprefix("sparse_") in FAMILIES and str(saved).startswith("sparse_"):
        raise ValueError(f"{path} is a {saved} model and cannot be loaded with a dense config; leave config= out")


def _refuse_sparse_block(config: PreTrainedConfig) -> None:
    if getattr(config, "sparse_attention", None) is not None:
        raise ValueError(
            f"the config has `sparse_attention` but model_type {config.model_type!r}, which would run it as softmax: "
            f"it should be 'sparse_{config.model_type}'; config.json was changed by hand"
        )


def _converted(config: PreTrainedConfig, name: str, options: dict | None) -> PreTrainedConfig:
    if isinstance(options, SparseAttentionConfig):
        options = options.to_dict()
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
    # AutoTokenizer decides by model_type which class reads a tokenizer.json: the same one as for the dense model.
    sparse_type = f"sparse_{family.name}"
    if family.name in tokenization_auto.TOKENIZER_MAPPING_NAMES:
        tokenization_auto.TOKENIZER_MAPPING_NAMES[sparse_type] = tokenization_auto.TOKENIZER_MAPPING_NAMES[family.name]
    if family.name in getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ()):
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(sparse_type)
    AutoConfig.register(f"sparse_{family.name}", sparse_class(family, "Config"))
    for kind, name in AUTO_CLASSES.items():
        sparse, auto = sparse_class(family, kind), getattr(transformers, name)
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
