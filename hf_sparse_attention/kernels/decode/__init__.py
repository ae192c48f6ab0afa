"""Decoding as a `torch.library` operator: fake shapes for torch.compile, no gradient, nothing asked of the device."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton

from ..operators import _CALL, _register, _vmap, describe
from .launch import pages_read, run_passes

# Queries of one sequence that count as decoding: more are a prefill.
MOST_QUERIES = 16


# Compute capabilities of cards these kernels were measured on. Elsewhere few queries run on the forward of training.
MEASURED = ((9, 0),)


@dataclass
class _Switch:
    # Read once: torch.compile cannot trace the questions, but guards the answer.
    on: bool = triton.knobs.runtime.interpret or (
        torch.cuda.is_available() and torch.cuda.get_device_capability() in MEASURED
    )


_switch = _Switch()


@contextmanager
def decoding(on):
    """Whether few queries run on these kernels inside the block, to test and to time them."""
    before, _switch.on = _switch.on, on
    try:
        yield
    finally:
        _switch.on = before


def is_decoding(queries, save, pages=None):
    """Whether a call runs here: few queries, no gradient wanted, and a measured card or bounds of pages."""
    return queries <= MOST_QUERIES and not save and (_switch.on or pages is not None)


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
    codes: torch.Tensor | None,
    ball: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = describe(query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask)
    with torch.cuda.device_of(query):
        return run_passes(call, None if lower is None else (lower, upper, codes, ball, state))


def share_of_pages_read(query, key, pages, *, alpha=1.5):
    """The share of the pages that one decoding step reads with these bounds, of all its keys."""
    call = describe(query, key, key, alpha, None, query.shape[-1] ** -0.5, True, None, None, None)
    with torch.cuda.device_of(query):
        return pages_read(call, (*pages[:4], None)).double().mean().item() / call.key_tiles


def _decode_fake(
    query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, lower, upper, codes, ball, state
):
    batch, heads, queries, head_dim = query.shape
    out = query.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)
    return out, query.new_empty((batch, heads, queries), dtype=torch.float32)


entmax_decode = _register(
    "entmax_decode",
    f"(Tensor query, Tensor key, Tensor value, {_CALL}, Tensor? lower, Tensor? upper, Tensor? codes,"
    " Tensor? ball, Tensor(a!)? state) -> (Tensor, Tensor)",
    decode_call,
    _decode_fake,
)
torch.library.register_vmap("hf_sparse_attention::entmax_decode", _vmap)
