"""Sparse attention that is trained, not approximated, for Hugging Face Transformers.

Importing tells the Auto classes of every attention map and every sparse model; what computes them is imported with
the first model.
"""

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


def __getattr__(name):
    if name == "implementation":
        from .attention import implementation

        return implementation
    if name in _classes:
        return _class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
