"""Sparse configs: a dense config and a `SparseAttentionConfig` enter, the family's sparse config leaves, checked."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from ..config import GUARD, GUARDED_FIELDS, SparseAttentionConfig
from .classes import family_of, sparse_class
from .families import FAMILIES, REFUSED, Family
from .remote_code import auto_map, write_module


class SparseConfig:
    """Mixin before a family's config: `sparse_attention` is checked whenever a config is made."""

    def __post_init__(self, **kwargs):
        sparse_attention = kwargs.pop("sparse_attention", None)
        super().__post_init__(**kwargs)
        if sparse_attention is not None:
            sparse_attention = SparseAttentionConfig.from_dict(sparse_attention).to_dict()
        self.sparse_attention = sparse_attention
        if sparse_attention is not None and self._attn_implementation is None:
            # A dense class that is given this config then meets our attention function, which refuses it.
            self._attn_implementation = sparse_attention["map"]
        for name in GUARDED_FIELDS:
            value = getattr(self, name, None)
            if isinstance(value, str):
                setattr(self, name, value.removesuffix(GUARD))

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in Transformers, for a config that was saved: it says everything of its attention."""
        if config_dict.get("sparse_attention") is not None:
            SparseAttentionConfig.from_saved(config_dict["sparse_attention"])
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        values = super().to_dict()
        for name in GUARDED_FIELDS:
            if isinstance(values.get(name), str):
                values[name] += GUARD
        values["auto_map"] = auto_map(family_of(self))
        return values

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in Transformers, with the module beside it that `trust_remote_code=True` runs."""
        super().save_pretrained(save_directory, **({} if push_to_hub else kwargs))
        write_module(save_directory)
        if push_to_hub:
            # Not left to Transformers, which would list what is new before the module is written.
            self.push_to_hub(kwargs.pop("repo_id", str(save_directory).rstrip("/").rpartition("/")[2]), **kwargs)


def check_convertible(config: PreTrainedConfig) -> Family:
    """The family of a dense config.

    Raises:
        ValueError: for an already sparse model, an encoder, an unknown family, or a feature we do not compute.
    """
    name = config.model_type
    if name in (f"sparse_{family}" for family in FAMILIES):
        saved = SparseAttentionConfig.from_model_config(config)
        raise ValueError(
            f"the model is already sparse ({name}, map {saved.map}): train it with `hf-sparse-attention train "
            "--model`, or load it with from_pretrained"
        )
    if name in REFUSED:
        raise ValueError(f"{name} needs {REFUSED[name]}, which sparse attention does not compute")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not a supported decoder; supported: {', '.join(FAMILIES)}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"attn_logit_softcapping is {config.attn_logit_softcapping}: sparse attention computes no soft-capping"
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise ValueError("the model attends in both directions; sparse attention converts causal decoders")
    return FAMILIES[name]


def sparse_config(dense: PreTrainedConfig, sparse_attention: SparseAttentionConfig) -> PreTrainedConfig:
    """The sparse config of a dense one: every dense field kept, `sparse_attention` added.

    Raises:
        ValueError: see `check_convertible`; also for layer numbers the model does not have.
    """
    family = check_convertible(dense)
    if sparse_attention.train_length is None:
        length = getattr(dense, "max_position_embeddings", None) or 2048
        sparse_attention = replace(sparse_attention, train_length=length)
    values = dense.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    config = sparse_class(family, "Config")(**values, sparse_attention=sparse_attention.to_dict())
    config.name_or_path = dense.name_or_path
    for layer in sparse_layers(config):
        sparse_heads(config, layer)
    return config


def dense_config(sparse: PreTrainedConfig) -> PreTrainedConfig:
    """The family's own config of a sparse one: every field but those that make it sparse."""
    values = sparse.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "sparse_attention"):
        values.pop(key, None)
    for name in GUARDED_FIELDS:
        if isinstance(values.get(name), str):
            values[name] = values[name].removesuffix(GUARD)
    return family_of(sparse).dense("Config")(**values)


def layer_window(config: PreTrainedConfig, layer: int) -> int | None:
    """The sliding window of a layer in tokens, or None for full attention."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def sparse_layers(config: PreTrainedConfig) -> list[int]:
    """Numbers of the layers whose attention is sparse.

    Raises:
        ValueError: if there is none, or a listed layer does not exist.
    """
    choice = SparseAttentionConfig.from_model_config(config).layers
    count = config.num_hidden_layers
    if choice == "all":
        return list(range(count))
    if choice == "full_attention":
        chosen = [layer for layer in range(count) if layer_window(config, layer) is None]
        if not chosen:
            raise ValueError(
                f"sparse_attention.layers is 'full_attention', but all {count} layers have a sliding window of "
                f"{config.sliding_window} tokens; use 'all'"
            )
        return chosen
    beyond = [layer for layer in choice if layer >= count]
    if beyond:
        raise ValueError(f"sparse_attention.layers names {beyond}, but the model has layers 0 to {count - 1}")
    return list(choice)


def sparse_heads(config: PreTrainedConfig, layer: int) -> tuple[int, ...]:
    """Numbers of the heads of a sparse layer that have the map.

    Raises:
        ValueError: if a listed head does not exist, or heads are listed for a layer that is not sparse.
    """
    choice = SparseAttentionConfig.from_model_config(config).heads
    count = config.num_attention_heads
    if isinstance(choice, dict):
        beyond = sorted(set(choice) - set(sparse_layers(config)))
        if beyond:
            raise ValueError(f"sparse_attention.heads names layers {beyond}, whose attention is not sparse")
        choice = choice.get(layer, "all")
    if choice == "all":
        return tuple(range(count))
    if choice[-1] >= count:
        raise ValueError(f"sparse_attention.heads names head {choice[-1]}, but the model has heads 0 to {count - 1}")
    return choice
