"""Sparse attention that is trained, not approximated, for Hugging Face Transformers.

Importing registers every attention map as an `attn_implementation` and every sparse model with the Auto classes.
"""

from . import attention, models
from .attention import implementation
from .cache import BoundedDynamicCache, BoundedStaticCache
from .config import VERSION as __version__
from .config import SparseAttentionConfig
from .maps import MAPS
from .models import CLASSES as _classes
from .models import FAMILIES, set_alpha, sparse_config
from .reference import entmax

attention.register()
models.register()
globals().update(_classes)

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
