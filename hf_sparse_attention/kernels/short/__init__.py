"""Calls whose rows of scores fit into registers: output and tau in one kernel, gradients in two, no lists of tiles.

A program of the forward holds every score of its rows, so that tau is found there, to float32 rounding. Nothing else
is kept for the backward, which computes the scores again: all keys of a block of queries, all queries of one of keys.
"""

from .gradients import short_gradients
from .output import attend_short

__all__ = ["attend_short", "is_short", "short_gradients"]


def is_short(short_keys, queries, keys):
    """Whether a call of these lengths runs here; the same for real tensors, fake ones and symbolic lengths."""
    return keys <= short_keys and queries <= short_keys
