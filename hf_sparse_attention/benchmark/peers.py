"""What the kernels are timed beside: softmax of torch, and other entmax kernels where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Args:
        make: arguments -> a function of query, key and value, or None where it is not installed.
        softmax: whether it computes softmax, so that its time says what sparsity must beat.
    """

    make: Callable
    softmax: bool


def sdpa(backend: str):
    def make(arguments):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attention(query, key, value):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
                )

        return attention

    return make


def _flex(arguments):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), {}

    def attention(query, key, value):
        length = query.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
        return compiled(query, key, value, block_mask=masks[length], enable_gqa=query.shape[1] != key.shape[1])

    return attention


def _adasplash_1(arguments):
    if importlib.util.find_spec("adasplash") is None:
        return None

    def attention(query, key, value):
        # Here, so that a version without it, or one that cannot be imported, refuses like any other.
        from adasplash import adasplash_v1

        if not 1 < arguments.alpha <= 2:
            raise ValueError(f"its alpha is in (1, 2], not {arguments.alpha}")
        # Whoever has grouped heads must repeat keys and values for it, and add up their gradients.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return adasplash_v1(query, key, value, alpha=arguments.alpha, is_causal=True)

    return attention


def _adasplash_2(arguments):
    if importlib.util.find_spec("adasplash") is None:
        return None

    def attention(query, key, value):
        from adasplash import adasplash_v2

        if arguments.alpha != 1.5:
            raise ValueError(f"its alpha is 1.5, not {arguments.alpha}")
        # Grouped heads it reads as they are.
        return adasplash_v2(query, key, value)

    return attention


PEERS = {
    "sdpa flash": Peer(sdpa("FLASH_ATTENTION"), softmax=True),
    "sdpa cudnn": Peer(sdpa("CUDNN_ATTENTION"), softmax=True),
    "flex attention": Peer(_flex, softmax=True),
    "adasplash 1": Peer(_adasplash_1, softmax=False),
    "adasplash 2": Peer(_adasplash_2, softmax=False),
}


def make_peers(arguments, names: list[str] | None = None) -> dict[str, Callable]:
    """Those of the peers, by default of all that the arguments name, that are installed."""
    made = {name: PEERS[name].make(arguments) for name in (arguments.peers if names is None else names)}
    return {name: attention for name, attention in made.items() if attention is not None}
