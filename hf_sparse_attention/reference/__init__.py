"""The specification: alpha-entmax and attention with it in PyTorch, on any device, in any dtype."""

from .output import attention, attention_weights
from .simplex import entmax
from .support import block_occupancy, support_size, weight_tiles
from .threshold import weights_from_tau

__all__ = [
    "attention",
    "attention_weights",
    "block_occupancy",
    "entmax",
    "support_size",
    "weight_tiles",
    "weights_from_tau",
]
