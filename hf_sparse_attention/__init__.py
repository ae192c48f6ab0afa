"""Sparse attention that is trained, not approximated, for Hugging Face Transformers.

Importing tells the Auto classes of every attention map and every sparse model; what computes them is imported with
the first model.
"""

from importlib import import_module

from .config import VERSION as __version__
from .config import SparseAttentionConfig
from .maps import MAPS
from .models import CLASSES as _classes
from .models import FAMILIES, set_alpha, sparse_config
from .models import class_named as _class_named
from .models import register as _register
from .reference import entmax

_register()

__all__ = [
    "BoundedDynamicCache",
    "BoundedStaticCache",
    "FAMILIES",
    "MAPS",
    "SparseAttentionConfig",
    "__version__",
    "entmax",
    "implementation",
    "set_alpha",
    "sparse_config",
    *sorted(_classes),
]


# Name -> the module it is imported from when it is asked for: these need the models of Transformers.
_LATER = {"implementation": "attention", "BoundedDynamicCache": "cache", "BoundedStaticCache": "cache"}


def __getattr__(name):
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    if name in _classes:
        return _class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
