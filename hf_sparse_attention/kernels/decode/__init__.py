"""Decoding as a `torch.library` operator: fake shapes for torch.compile, no gradient, nothing asked of the device."""

import torch

from ..operators import _CALL, _register, _vmap, describe
from .launch import pages_read, run_passes

# Queries of one sequence that count as decoding: more are a prefill.
MOST_QUERIES = 16


def is_decoding(queries, save):
    """Whether a call is decoding: few queries whose gradient nobody wants."""
    return queries <= MOST_QUERIES and not save


def decode_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    alpha: float,
    alpha_tensor: torch.Tensor | None,
    scaling: float,
    causal: bool,
    visible: torch.Tensor | None,
    slopes: torch.Tensor | None,
    mask: torch.Tensor | None,
    lower: torch.Tensor | None,
    upper: torch.Tensor | None,
    radius: torch.Tensor | None,
    idle: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = describe(query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask)
    with torch.cuda.device_of(query):
        return run_passes(call, None if lower is None else (lower, upper, radius, idle))


def share_of_pages_read(query, key, pages, *, alpha=1.5):
    """The share of the pages that one decoding step reads with these bounds, of all its keys."""
    call = describe(query, key, key, alpha, None, query.shape[-1] ** -0.5, True, None, None, None)
    with torch.cuda.device_of(query):
        return pages_read(call, (*pages[:3], None)).double().mean().item() / call.key_tiles


def _decode_fake(
    query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, lower, upper, radius, idle
):
    batch, heads, queries, head_dim = query.shape
    out = query.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)
    return out, query.new_empty((batch, heads, queries), dtype=torch.float32)


entmax_decode = _register(
    "entmax_decode",
    f"(Tensor query, Tensor key, Tensor value, {_CALL}, Tensor? lower, Tensor? upper, Tensor? radius,"
    " Tensor(a!)? idle) -> (Tensor, Tensor)",
    decode_call,
    _decode_fake,
)
torch.library.register_vmap("hf_sparse_attention::entmax_decode", _vmap)
