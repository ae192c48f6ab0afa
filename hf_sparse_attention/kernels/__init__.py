"""alpha-entmax attention in Triton, alpha in (1, 4]: the contract of `reference`, on CUDA, ROCm or the interpreter.

out, tau = entmax_attention(query, key, value, alpha=1.5)      supports(query, key, value) -> None or why not
"""

import math

import torch
import triton

from .configurations import TILE
from .decode import entmax_decode, is_decoding
from .decode.bounds import BALL
from .decode.pages import STATE
from .operators import entmax_forward, takes_softmax

__all__ = ["entmax_attention", "softmax_of_few_keys", "supports"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256
LARGEST_ALPHA = 4.0


# Read once, as Triton does when it builds the kernels; torch.compile cannot trace the question.
_INTERPRETED = triton.knobs.runtime.interpret


def supports(query, key, value, *, alpha=1.5, scaling=None, causal=True, visible=None, slopes=None, mask=None):
    """None if the kernels compute this call, else a sentence that says why they do not."""
    if query.device.type != "cuda" and not _INTERPRETED:
        return f"the Triton kernels need a CUDA or ROCm device, the query is on {query.device.type!r}"
    # Under autocast the inputs are cast first: rotary positions leave float32 queries beside bfloat16 values.
    low = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else None
    dtype = low or query.dtype
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    if dtype == torch.bfloat16 and _INTERPRETED:
        return "Triton's interpreter has no bfloat16 products"
    if low is None and (key.dtype != query.dtype or value.dtype != query.dtype):
        return f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}"
    if query.shape[-1] > LARGEST_HEAD_DIM:
        return f"head_dim {query.shape[-1]} is larger than {LARGEST_HEAD_DIM}"
    if value.shape[-1] != query.shape[-1]:
        return f"value's head_dim {value.shape[-1]} differs from query's {query.shape[-1]}"
    if min(query.shape) == 0 or key.shape[2] == 0:
        return f"an empty dimension: query {tuple(query.shape)}, key {tuple(key.shape)}"
    if key.shape[2] > 64 * 32767:
        return f"{key.shape[2]} keys are more than {64 * 32767}"
    if not isinstance(alpha, torch.Tensor) and not 1.0 < alpha <= LARGEST_ALPHA:
        return f"alpha {alpha} is outside (1, {LARGEST_ALPHA:g}]"
    if scaling is not None and not scaling > 0:
        return f"scaling {scaling} is not positive"
    return None


def entmax_attention(
    query, key, value, *, alpha=1.5, scaling=None, causal=True, visible=None, slopes=None, mask=None, pages=None
):
    """out_i = sum_j p_ij v_j with p_ij = [(alpha-1) score_ij - tau_i]_+ ^ (1/(alpha-1)), sum_j p_ij = 1.

    query (batch, heads, queries, dim); key, value (batch, kv_heads, keys, dim), heads a multiple of kv_heads.
    score_ij = scaling * q_i . k_j - slope_h * (end_i - 1 - j), scaling dim**-0.5 by default.
    alpha: float in (1, 4], or float tensor (heads,) with values in that range, which may require grad.
    visible: integer (batch or 1, queries, 2), the half-open range [start, end) of keys each query sees. None: if
        causal, query i sees the keys up to keys - queries + i, else all. slopes: (heads,), ALiBi slopes. mask: bool,
        broadcastable to (batch, heads, queries, keys), True = visible.
    pages: (lower, upper, codes, ball) or (lower, upper, codes, ball, state), for decoding (at most 16 queries without
        a gradient; else they are not read). lower and upper (batch, kv_heads, pages, dim) in key's dtype, the
        per-channel minimum and maximum of every page of 64 keys; codes int8 of the same shape and ball (batch,
        kv_heads, pages, 3) in float32 a ball that holds the page's keys: ball[..., 0] * codes is its middle, with
        ball[..., 0] a power of two, ball[..., 1] its radius, ball[..., 2] at least its middle's length. Not read of a
        page that ends after the last key a query of its sequence sees. state, contiguous int32 (3,), starts at zeros
        and is written, so no two calls may have it at a time: for how many calls the bounds rest still, 31 where so
        many pages must be read that they do not pay, and two counters of a launch, zero again at its end. Without it
        they never rest.
    Returns out in query's shape and dtype and tau (batch, heads, queries) in float32, not differentiable. A row that
    sees no key gives zeros, tau = +inf and zero gradients. Gradients for query, key, value and alpha, the same bits
    every run.
    Raises ValueError for what the kernels do not compute. Peters, Niculae, Martins 2019 (arXiv 1905.05702).
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, dim), got {tuple(tensor.shape)}")
    if query.shape[1] % key.shape[1] or key.shape != value.shape or query.shape[0] != key.shape[0]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"query, key and value do not fit each other: {shapes}")
    if slopes is not None and visible is None and not causal:
        raise ValueError("slopes need causal=True or a visible range: the distance is measured from its end")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        # Bounds of keys that are rounded afterwards need not hold.
        pages = pages if key.dtype == dtype else None
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    reason = supports(
        query, key, value, alpha=alpha, scaling=scaling, causal=causal, visible=visible, slopes=slopes, mask=mask
    )
    if reason is not None:
        raise ValueError(f"the Triton kernels do not compute this attention: {reason}")
    if scaling is None:
        scaling = 1.0 / math.sqrt(query.shape[-1])
    alpha_tensor = None
    if isinstance(alpha, torch.Tensor):
        if alpha.shape != (query.shape[1],):
            raise ValueError(f"alpha must be a float or of shape ({query.shape[1]},), got {tuple(alpha.shape)}")
        alpha_tensor, alpha = alpha, 0.0
    inputs = [query, key, value] + ([] if alpha_tensor is None else [alpha_tensor])
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if is_decoding(query.shape[2], save, pages):
        return entmax_decode(
            query, key, value, float(alpha), alpha_tensor, float(scaling), causal, visible, slopes, mask,
            *_checked_pages(pages, key),
        )  # fmt: skip
    dtype = query.dtype
    if alpha_tensor is None and alpha > 2.0 and dtype != torch.float32:
        # The slopes of alpha > 2 are unbounded at the threshold: half precision would lose the gradient.
        query, key, value = query.float(), key.float(), value.float()
    out, tau, *_ = entmax_forward(
        query, key, value, float(alpha), alpha_tensor, float(scaling), causal, visible, slopes, mask, save
    )
    return out.to(dtype), tau.detach()


def softmax_of_few_keys(query, key, value, *, scaling=None, causal=True, visible=None, slopes=None, mask=None):
    """Softmax over the keys each query sees, as `entmax_attention` describes them, or None where it is not computed.

    SDPA reads slopes and ranges as a matrix of all queries times all keys; a training call of few keys in half
    precision is faster here. Returns out alone.
    """
    tensors = [query, key, value]
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        tensors = [tensor.to(dtype) for tensor in tensors]
    call = {"scaling": scaling, "causal": causal, "visible": visible, "slopes": slopes, "mask": mask}
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not trains or supports(*tensors, **call) is not None or not takes_softmax(*tensors):
        return None
    scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
    out, *_ = entmax_forward(*tensors, 1.0, None, scaling, causal, visible, slopes, mask, True)
    return out.to(query.dtype)


def _checked_pages(pages, key):
    """The bounds of the pages, or nothing, as the decoding operator takes them."""
    if pages is None:
        return None, None, None, None, None
    lower, upper, codes, ball, *state = pages
    least = (*key.shape[:2], key.shape[2] // TILE)
    for name, bounds, width, dtype in (
        ("lower bounds", lower, key.shape[3], key.dtype),
        ("upper bounds", upper, key.shape[3], key.dtype),
        ("codes", codes, key.shape[3], torch.int8),
        ("balls", ball, BALL, torch.float32),
    ):
        fits = bounds.dim() == 4 and bounds.shape[2] >= least[2] and bounds.stride(3) == 1
        if not fits or bounds.shape[:2] != least[:2] or bounds.shape[3] != width:
            raise ValueError(
                f"the {name} of pages have shape {tuple(bounds.shape)}; keys {tuple(key.shape)} need "
                f"{(*least, width)} or more pages"
            )
        if bounds.dtype != dtype or bounds.device != key.device:
            raise ValueError(
                f"the {name} of pages are {bounds.dtype} on {bounds.device}, not {dtype} on {key.device} as the keys "
                "need"
            )
    state = state[0] if state else None
    if state is not None:
        if state.dtype != torch.int32 or state.shape != (STATE,) or not state.is_contiguous():
            raise ValueError(
                f"the state of the pages is {state.dtype} {tuple(state.shape)}, not contiguous int32 ({STATE},): make "
                "one of zeros for each layer's bounds"
            )
        if state.device != key.device:
            raise ValueError(f"the state of the pages is on {state.device}, the keys on {key.device}")
    return lower, upper, codes, ball, state
