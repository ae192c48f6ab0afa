"""What every sparse model class adds to its dense one: it starts new parameters at zero, refuses any other attention,
converts a dense checkpoint on loading, and keeps packed documents apart."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_masks_for_generate

from ..attention import return_weights
from ..cache import check_cache
from ..config import ALIBI, SparseAttentionConfig
from ..maps import MAPS, NEW_MODULES
from ..visible import as_bool, with_new_tokens
from .classes import family_of, sparse_class
from .configuration import sparse_config, sparse_layers
from .families import Family
from .layers import document_starts
from .parameters import NEW_PARAMETER, ONLY_SAFETENSORS, new_parameter_names

logger = logging.getLogger(__name__)

_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_implementation(requested: str | None, config: PreTrainedConfig) -> str:
    """The one attn_implementation that computes what a sparse config says.

    Raises:
        ValueError: if another one is requested.
    """
    # Plain reading, which torch.compile can trace; what is missing is said by the check.
    expected = (getattr(config, "sparse_attention", None) or {}).get("map")
    expected = expected or SparseAttentionConfig.from_model_config(config).map
    if requested not in (None, expected):
        raise ValueError(
            f"this model computes {expected} and cannot run as {requested!r}, which is another function. Load it "
            f"without attn_implementation (or with {expected!r}), or convert the dense model again"
        )
    return expected


class SparsePreTrainedModel:
    """Mixin before every model class of a family: refuses other attention, starts new parameters at zero."""

    # Each of these would replace the attention by a softmax of its own; vLLM looks at the last one.
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config, *args, **kwargs):
        SparseAttentionConfig.from_model_config(config)
        super().__init__(config, *args, **kwargs)
        # What push_to_hub writes into the card.
        self.model_tags = ["hf-sparse-attention", "sparse-attention", config.sparse_attention["map"]]
        if getattr(config, "_from_dense", False):
            # from_pretrained says in one line what Transformers would list: that these start at zero.
            self._keys_to_ignore_on_load_missing = [NEW_PARAMETER.pattern]
        self._adopt()
        # The classes of Transformers end their constructor with this; parameters were added since.
        self.post_init()

    def _adopt(self) -> None:
        """Makes the inner model sparse, where this class has one."""
        inner = getattr(self, self.base_model_prefix, None)
        if inner is not None and not isinstance(inner, SparseModel):
            # The family's constructor made its dense inner model. Changing the class of that one in place would lose
            # what Transformers keeps by class (outputs to record), so the sparse one is made anew.
            setattr(self, self.base_model_prefix, sparse_class(family_of(self.config), "Model")(self.config))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NEW_MODULES):
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            super()._init_weights(module)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, num_new_tokens: int = 1, **kwargs):
        """As in Transformers; of the mask that new tokens are appended to it stays known what it looks like."""
        mask = model_kwargs.get("attention_mask")
        own = isinstance(mask, torch.Tensor) and mask.ndim == 2
        if own:
            # Not appended to by Transformers, so that what it looks like is right whatever they append.
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "attention_mask"}
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        if own:
            model_kwargs["attention_mask"] = with_new_tokens(mask, num_new_tokens)
        return model_kwargs

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, *args, **kwargs):
        """As in Transformers, of a padding mask that it will not copy."""
        create = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return create(config, inputs_embeds, _looked_at(attention_mask, inputs_embeds), *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        return self.get_correct_attn_implementation(attn_implementation)

    def get_correct_attn_implementation(self, requested_attention, is_init_check: bool = False) -> str:
        return check_implementation(requested_attention, self.config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in Transformers; a dense checkpoint of the family is converted on the way.

        Args:
            sparse_attention (dict): fields of `SparseAttentionConfig`. For a model that is already sparse only alpha
                can differ from what it was saved with.

        Raises:
            ValueError: if a sparse checkpoint lacks parameters of its map, or is asked to compute another map; for
                use_safetensors=False.
            OSError: if there are no safetensors weights: pickled ones are not loaded.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors is False, but pickled weights are not loaded: leave it out")
        options = kwargs.pop("sparse_attention", None)
        if isinstance(options, SparseAttentionConfig):
            options = options.to_dict()
        with_info = kwargs.pop("output_loading_info", False)
        hub = {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}
        saved = {}
        if pretrained_model_name_or_path is not None:
            saved, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        is_dense = bool(saved) and not str(saved.get("model_type", "")).startswith("sparse_")
        if config is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if not hasattr(config, "sparse_attention"):
            name = kwargs.pop("attn_implementation", None) or config._attn_implementation
            options = dict(options or {})
            if name in MAPS and options.setdefault("map", name) != name:
                raise ValueError(f"attn_implementation is {name!r} but sparse_attention['map'] is {options['map']!r}")
            config = sparse_config(config, SparseAttentionConfig.from_dict(options))
        elif not is_dense and saved:
            # A change may come with the config, and names then only what it changes.
            changed, config.sparse_attention = config.sparse_attention, saved.get("sparse_attention")
            SparseAttentionConfig.from_model_config(config)
            config.sparse_attention = _merged(config.sparse_attention, changed, options)
        _check_split(config, kwargs)
        config._from_dense = is_dense
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True,
                use_safetensors=True, **kwargs,
            )  # fmt: skip
        except OSError as error:
            if ".safetensors" not in str(error):
                raise
            raise OSError(f"{error} {ONLY_SAFETENSORS}") from error
        del model.config._from_dense
        lost = sorted(set(info["missing_keys"]) & set(new_parameter_names(model)))
        if lost and not is_dense and kwargs.get("state_dict") is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} says it computes {config.sparse_attention['map']}, but lacks "
                f"{len(lost)} of its parameters, first {lost[0]}: the checkpoint is incomplete"
            )
        if is_dense and "disk" in getattr(model, "hf_device_map", {}).values():
            raise ValueError(
                f"device_map puts layers of {pretrained_model_name_or_path} on disk, where the new parameters of "
                f"{config.sparse_attention['map']} are not: convert it to a folder first, with "
                f"hf-sparse-attention convert --model {pretrained_model_name_or_path} --output FOLDER"
            )
        foreign = sorted(name for name in info["unexpected_keys"] if NEW_PARAMETER.search(name))
        if foreign:
            raise ValueError(
                f"{pretrained_model_name_or_path} says it computes {config.sparse_attention['map']}, but has "
                f"{len(foreign)} parameters of another map, first {foreign[0]}: config.json was changed by hand"
            )
        if is_dense:
            # Adapters note this as their base. The dense folder's own name would load as softmax, and silently.
            model.name_or_path = model.config.name_or_path = (
                f"{pretrained_model_name_or_path} (converted to {config.sparse_attention['map']} while loading: "
                "convert it to a folder first, and train adapters on that)"
            )
            logger.warning(
                "%s was trained with softmax and now runs %s (alpha %g, position %s), with which it was not trained. "
                "Train it: hf-sparse-attention train --model %s --map %s --train_data TEXT --output RUN",
                pretrained_model_name_or_path, *(config.sparse_attention[key] for key in ("map", "alpha", "position")),
                pretrained_model_name_or_path, config.sparse_attention["map"],
            )  # fmt: skip
        return (model, info) if with_info else model


def _check_split(config: PreTrainedConfig, kwargs: dict) -> None:
    """Raises ValueError if tensor parallelism would split the heads but not what the map or positions know of each."""
    plan = kwargs.get("distributed_config")
    sizes = [
        kwargs.get("tp_plan"),
        kwargs.get("tp_size"),
        getattr(plan, "tp_plan", None),
        getattr(plan, "tp_size", None),
    ]
    if all(size in (None, 1) for size in sizes):
        return
    settings = SparseAttentionConfig.from_model_config(config)
    row = MAPS[settings.map]
    if row.has_parameters or settings.position in ALIBI or settings.heads != "all":
        chosen = "" if settings.heads == "all" else f" and heads {settings.heads}"
        raise ValueError(
            f"tensor parallelism splits the heads between processes, but {settings.map} with positions "
            f"{settings.position}{chosen} knows something of every head, which would stay whole: load it without "
            "tp_plan, and train with FSDP2"
        )


def _merged(saved: dict, current: dict, options: dict | None) -> dict:
    """The block of a saved sparse model with a caller's changes, of which only alpha is one that its weights allow."""
    asked = {**(current if current != saved else {}), **(options or {})}
    merged = SparseAttentionConfig.from_dict({**saved, **asked}).to_dict()
    changed = [key for key in merged if key in saved and merged[key] != saved[key]]
    if set(changed) - {"alpha"}:
        raise ValueError(
            f"the model was saved with {', '.join(f'{key}={saved[key]!r}' for key in changed)}; asked for "
            f"{', '.join(f'{key}={merged[key]!r}' for key in changed)}: convert the dense model again"
        )
    return merged


class SparseModel(SparsePreTrainedModel):
    """Mixin before a family's inner model: its attention layers become sparse, packed documents stay apart."""

    def _adopt(self) -> None:
        family = family_of(self.config)
        attention_class, sparse = sparse_class(family, "Attention"), set(sparse_layers(self.config))
        for module in list(self.modules()):
            if type(module) is family.dense("Attention"):
                module.__class__ = attention_class
                module.become_sparse(self.config, family.rotates(module), module.layer_idx in sparse)
        _register_weight_conversion(family)

    def forward(self, *args, **kwargs):
        # None, which a config made anew has, would run the family's eager softmax.
        check_implementation(self.config._attn_implementation or "eager", self.config)
        position_ids = kwargs.get("position_ids", args[2] if len(args) > 2 else None)
        told = [name for name in ("cu_seq_lens_q", "seq_idx") if kwargs.get(name) is not None]
        if position_ids is None and told:
            raise ValueError(
                f"{told[0]} without position_ids: documents would see each other. Pass position_ids that restart "
                "at 0 in every document, as DataCollatorWithFlattening does"
            )
        # Without mask and cache Transformers takes every jump of the positions for a new document.
        uses_cache = kwargs.get("use_cache") if kwargs.get("use_cache") is not None else self.config.use_cache
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        cache = kwargs.get("past_key_values", args[3] if len(args) > 3 else None)
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if cache is not None and inputs is not None and not isinstance(cache, torch.Tensor):
            check_cache(cache, self.config, inputs, mask if isinstance(mask, torch.Tensor) else None, self)
        strict = mask is None and cache is None and not uses_cache
        starts = document_starts(position_ids, every_jump=strict)
        if starts is None and getattr(kwargs.get("cu_seq_lens_q"), "numel", int)() > 2:
            raise ValueError("cu_seq_lens_q has several documents, but position_ids do not restart in them")
        kwargs["document_starts"] = starts
        if mask is not None and inputs is not None:
            # Transformers would copy what is not there or not boolean.
            if "attention_mask" in kwargs:
                kwargs["attention_mask"] = _looked_at(mask, inputs)
            else:
                args = (args[0], _looked_at(mask, inputs), *args[2:])
        if not kwargs.get("output_attentions"):
            return super().forward(*args, **kwargs)
        with return_weights():
            return super().forward(*args, **kwargs)


def _looked_at(mask, inputs: torch.Tensor):
    """A padding mask as the mask function will get it; of any other mask nothing is known."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or torch.compiler.is_compiling():
        return mask
    return as_bool(mask, inputs.device)


def _register_weight_conversion(family: Family) -> None:
    """Checkpoints whose tensors Transformers renames or regroups on loading are treated alike for the sparse classes.

    It looks for these rules by model_type or by class name, neither of which is the dense one's here.
    """
    names = {family.name: f"sparse_{family.name}"}
    for kind in ("Model", "ForCausalLM", "ForSequenceClassification"):
        if sparse_class(family, kind) is not None:
            names[family.dense(kind).__name__] = sparse_class(family, kind).__name__
    for dense, sparse in names.items():
        conversion = get_checkpoint_conversion_mapping(dense)
        if conversion is not None and get_checkpoint_conversion_mapping(sparse) is None:
            register_checkpoint_conversion_mapping(sparse, conversion)
