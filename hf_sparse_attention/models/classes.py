"""The sparse classes of a family, made when they are first asked for: the modules they come from take Transformers a
second to import. Only the config classes are made at once, which the Auto classes need to read a config.json."""

from __future__ import annotations

import sys

from .families import FAMILIES, Family

# The classes are found under the package that holds this file, which is where pickle looks for them.
PACKAGE = __name__.rpartition(".")[0]

KINDS = ("Config", "Attention", "Model", "ForCausalLM", "ForSequenceClassification")
# Name of every class that the installed Transformers allows -> its family and kind; filled by registration.py.
CLASSES: dict[str, tuple[Family, str]] = {}
_made: dict[str, type] = {}


def class_name(family: Family, kind: str) -> str:
    """The name of a class of a family, such as SparseLlamaForCausalLM."""
    return f"Sparse{family.class_prefix(kind)}{kind}"


def sparse_class(family: Family, kind: str) -> type | None:
    """`SparseLlamaForCausalLM` and its like; None for a kind the dense family does not have."""
    name = class_name(family, kind)
    return class_named(name) if name in CLASSES else None


def class_named(name: str) -> type:
    """The class of a name in `CLASSES`."""
    if name not in _made:
        family, kind = CLASSES[name]
        dense, mixin = family.dense(kind), _mixin(kind)
        body = {"__module__": PACKAGE, "__doc__": f"{dense.__name__} with the attention its config says."}
        if kind == "Config":
            body["model_type"] = f"sparse_{family.name}"
        elif kind != "Attention":
            body["config_class"] = sparse_class(family, "Config")
        _made[name] = type(name, (mixin, dense), body)
        setattr(sys.modules[PACKAGE], name, _made[name])
    return _made[name]


def _mixin(kind: str) -> type:
    if kind == "Config":
        from .configuration import SparseConfig

        return SparseConfig
    from .. import attention
    from .layers import SparseAttention
    from .pretrained import SparseModel, SparsePreTrainedModel

    attention.register()
    return {"Attention": SparseAttention, "Model": SparseModel}.get(kind, SparsePreTrainedModel)


def family_of(config) -> Family:
    """The family of a sparse config."""
    return FAMILIES[config.model_type.removeprefix("sparse_")]
