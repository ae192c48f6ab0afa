"""Tells the Auto classes of every family the installed Transformers has. They hold entries that make, and import, a
model class when a model is loaded; an entry of a dense config sends our names to the sparse class."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import tokenization_auto

from ..config import SparseAttentionConfig
from ..maps import MAPS
from .classes import CLASSES, KINDS, PACKAGE, class_name, sparse_class
from .configuration import sparse_config
from .families import FAMILIES, ROWS, Family
from .remote_code import AUTO_CLASSES


class SparseEntry:
    """Stands in an Auto class for the sparse class of a family."""

    def __init__(self, family: Family, kind: str):
        self.family, self.kind = family, kind
        self.__name__ = self.__qualname__ = class_name(family, kind)
        self.__module__ = PACKAGE
        self.config_class = sparse_class(family, "Config")

    def model_class(self) -> type:
        return sparse_class(self.family, self.kind)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model_class(), name)

    def __call__(self, *arguments, **keywords):
        return self.model_class()(*arguments, **keywords)

    def __repr__(self):
        return f"<{self.__module__}.{self.__name__}>"


class DenseEntry(SparseEntry):
    """Stands in an Auto class for the dense class of a family, which it loads unless one of our maps is asked for."""

    def __init__(self, family: Family, kind: str):
        super().__init__(family, kind)
        self.__name__ = self.__qualname__ = family.dense_name(kind)
        # Transformers takes a class from elsewhere for custom code, which would outrank a checkpoint's own
        # `trust_remote_code` class.
        self.__module__ = family.dense_module(kind)
        self.config_class = family.dense("Config")

    def model_class(self) -> type:
        return self.family.dense(self.kind)

    def from_pretrained(self, path, *model_args, config=None, **kwargs):
        name = kwargs.get("attn_implementation") or config._attn_implementation
        _refuse_sparse_folder(path)
        _refuse_sparse_block(config)
        if name not in MAPS:
            _refuse_options(kwargs)
            return self.model_class().from_pretrained(path, *model_args, config=config, **kwargs)
        kwargs.pop("attn_implementation", None)
        config = _converted(config, name, kwargs.pop("sparse_attention", None))
        return sparse_class(self.family, self.kind).from_pretrained(path, *model_args, config=config, **kwargs)

    def _from_config(self, config, **kwargs):
        # Our name in the config alone comes from a dense class that makes its inner model. Were that one sparse, the
        # outer class would save it as a dense model; as it is, the first call is refused.
        name = kwargs.get("attn_implementation")
        _refuse_sparse_block(config)
        if name not in MAPS:
            _refuse_options(kwargs)
            return self.model_class()._from_config(config, **kwargs)
        kwargs.pop("attn_implementation", None)
        config = _converted(config, name, kwargs.pop("sparse_attention", None))
        return sparse_class(self.family, self.kind)._from_config(config, **kwargs)


def _refuse_options(kwargs: dict) -> None:
    if kwargs.pop("sparse_attention", None) is not None:
        raise ValueError(f"sparse_attention=... needs attn_implementation=, one of {', '.join(MAPS)}")


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


def _register_dense(auto, config_class: type, entry: DenseEntry) -> None:
    auto.register(config_class, entry, exist_ok=True)
    # Some releases (5.17 is one) drop in silence what is registered for a config class of Transformers' own; our
    # maps would then be asked of the dense class.
    if auto._model_mapping[config_class] is not entry:
        auto._model_mapping._extra_content[config_class] = entry


def _add(family: Family, kinds: list[str]) -> None:
    """Tells the Auto classes of one family."""
    FAMILIES[family.name] = family
    CLASSES.update({class_name(family, kind): (family, kind) for kind in kinds})
    sparse_type = f"sparse_{family.name}"
    # AutoTokenizer decides by model_type which class reads a tokenizer.json: the same one as for the dense model.
    if family.name in tokenization_auto.TOKENIZER_MAPPING_NAMES:
        tokenization_auto.TOKENIZER_MAPPING_NAMES[sparse_type] = tokenization_auto.TOKENIZER_MAPPING_NAMES[family.name]
    if family.name in getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ()):
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(sparse_type)
    AutoConfig.register(sparse_type, sparse_class(family, "Config"))
    for kind, name in AUTO_CLASSES.items():
        if kind in kinds:
            auto = getattr(transformers, name)
            auto.register(sparse_class(family, "Config"), SparseEntry(family, kind))
            _register_dense(auto, family.dense("Config"), DenseEntry(family, kind))


def register() -> None:
    """Adds every family the installed Transformers has."""
    for family in ROWS:
        source = family.source()
        # Older releases run some families with attention of their own, past the AttentionInterface.
        if "ALL_ATTENTION_FUNCTIONS" in source:
            kinds = [kind for kind in KINDS if kind == "Config" or f"class {family.dense_name(kind)}(" in source]
            _add(family, kinds)
