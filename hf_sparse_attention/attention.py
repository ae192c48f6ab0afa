"""The attention function and the mask function that Transformers calls under our names. Enter q, k, v and what
models.py adds (alpha, query scale, slopes), leaves the output; picks what computes: SDPA, reference or kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from . import reference
from .heads import merge_heads, other_heads, take_heads, take_key_heads
from .maps import MAPS
from .softmax import softmax_attention
from .visible import Padding, padding_of

# Shapes: B batch, H heads, G key heads, N queries, K keys, D head size. A mask is one of
#   None                        causal over the first N keys (keys after them are unwritten cache)
#   int32 (B or 1, 1, N, 2)     the range [start, end) of the keys each query sees
#   uint8 (B, 1, N, K)          what a range cannot say, made by the mask function below; 1 is visible
#   bool or float (B, 1, N, K)  given by the caller; True, or 0, is visible

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "triton")
_announced: set[str] = set()


@dataclass
class _Switches:
    """What the context managers below set. torch.compile cannot trace context variables, but guards these."""

    implementation: str = "auto"
    recorder: Callable | None = None
    weights_wanted: bool = False


_switches = _Switches()


@contextmanager
def _switched(name: str, value) -> Iterator[None]:
    before = getattr(_switches, name)
    setattr(_switches, name, value)
    try:
        yield
    finally:
        setattr(_switches, name, before)


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Forces what computes the attention inside the block: "reference", "triton" or "auto" (the default).

    An explicit choice raises where it cannot compute a call; it never falls back.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    with _switched("implementation", name):
        yield


@contextmanager
def record(callback: Callable) -> Iterator[None]:
    """Calls `callback(module, query, key, tau, **arguments)` for every sparse attention inside the block.

    `query` is already multiplied by the map's factor, `arguments` are those of `reference.attention` (alpha, scaling,
    causal, visible, slopes, mask), and `query_scale` (B or 1, H, N, 1) or None. All tensors are detached.
    """
    with _switched("recorder", callback):
        yield


@contextmanager
def return_weights() -> Iterator[None]:
    """Makes the layers inside the block return their weights: some decoder layers drop `output_attentions`."""
    with _switched("weights_wanted", True):
        yield


def _announce(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _announced:
        _announced.add(message)
        logger.info(message)


def _kernels_refuse(*arguments, **keywords) -> str | None:
    """Why the Triton kernels do not compute this call, or None if they do."""
    if not arguments[0].is_cuda:
        return f"the Triton kernels need a GPU, the query is on {arguments[0].device.type}"
    try:
        from . import kernels
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernels.supports(*arguments, **keywords)


def sparse_attention(query, key, value, *, pages=None, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `reference.attention`, computed by what `implementation` chooses.

    pages: a cache's bounds of its keys, with which the kernels read fewer of them; the result is the same.
    """
    chosen = _switches.implementation
    refusal = None if chosen == "reference" else _kernels_refuse(query, key, value, **arguments)
    if chosen == "triton" and refusal is not None:
        raise ValueError(f"implementation('triton'): {refusal}")
    if chosen == "reference" or refusal is not None:
        _announce("attention runs on the PyTorch reference" + (f": {refusal}" if refusal else ""))
        return reference.attention(query, key, value, **arguments)
    from . import kernels

    _announce("attention runs on the Triton kernels")
    return kernels.entmax_attention(query, key, value, pages=pages, **arguments)


def sparse_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    alpha: float | torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    sparse_heads: tuple[int, ...] | None = None,
    page_bounds=None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Registered as the AttentionInterface of every map.

    Args:
        query: (B, H, N, D); key, value: (B, G, K, D) with the cache's keys.
        attention_mask: see the legend at the top.
        alpha, query_scale, slopes: what the model's sparse attention layer computed; alpha may be one per sparse head.
        sparse_heads: the heads whose weights are sparse, the others compute softmax; None: all of them.
        page_bounds: the layer of the cache, if it keeps bounds of its keys (`cache.page_bounds`), or None.

    Returns:
        output (B, N, H, D), and the weights (B, H, N, K) if `output_attentions=True`, else None.

    Raises:
        ValueError: if the layer is not one of a sparse model, or asks for what we do not compute: dropout,
            soft-capping, attention sinks.
    """
    if alpha is None:
        raise ValueError(
            f"{type(module).__name__} belongs to a dense model and says nothing of alpha or scale. Load it with "
            "AutoModelForCausalLM.from_pretrained(..., attn_implementation=<map>), which gives the sparse class, or "
            "convert it with `hf-sparse-attention convert`"
        )
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}, which sparse attention does not compute")
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, which sparse attention does not compute: set attention_dropout=0"
        )
    if attention_mask is None and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    visible, mask = split_mask(attention_mask, key.shape[2])
    if mask is not None and slopes is not None:
        visible = _enclosing_range(mask)
    # A caller's matrix says everything, as in SDPA; without it and without a range the attention is causal.
    arguments = {"scaling": scaling, "causal": mask is None, "visible": visible, "slopes": slopes, "mask": mask}
    if query_scale is not None:
        query = (query * query_scale).to(query.dtype)
    wanted = kwargs.get("output_attentions") or _switches.weights_wanted
    if sparse_heads is None or (isinstance(alpha, float) and alpha == 1.0):
        output, tau = _attend(query, key, value, alpha=alpha, page_bounds=page_bounds, **arguments)
    else:
        looked_at = wanted or _switches.recorder is not None
        output, tau, alpha = _attend_in_parts(
            query, key, value, sparse_heads, looked_at, alpha=alpha, page_bounds=page_bounds, **arguments
        )
    arguments["alpha"] = alpha
    if (callback := _switches.recorder) is not None:
        scale = None if query_scale is None else query_scale.detach()
        with torch.no_grad():
            callback(module, query.detach(), key.detach(), tau, query_scale=scale, **arguments)
    weights = reference.attention_weights(query, key, **arguments) if wanted else None
    return output.transpose(1, 2).contiguous(), weights


def _attend(query, key, value, *, alpha, page_bounds, **arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and tau; where alpha is 1 on SDPA, without tau."""
    if isinstance(alpha, float) and alpha == 1.0 and _switches.implementation != "reference":
        output = _softmax_of_few_keys(query, key, value, **arguments)
        return softmax_attention(query, key, value, **arguments) if output is None else output, None
    pages = None if page_bounds is None else page_bounds.bounds()
    return sparse_attention(query, key, value, alpha=alpha, pages=pages, **arguments)


def _softmax_of_few_keys(query, key, value, **arguments) -> torch.Tensor | None:
    """Softmax on the kernels where SDPA would be given a matrix for it and they are faster, or None."""
    if not query.is_cuda or all(arguments[name] is None for name in ("visible", "slopes", "mask")):
        return None
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels.softmax_of_few_keys(query, key, value, **arguments)


def _attend_in_parts(query, key, value, heads, looked_at, *, alpha, mask, page_bounds, **arguments):
    """Output where only `heads` are sparse; if it is looked at, also tau and alpha (H,), alpha 1 for the others."""
    group = query.shape[1] // key.shape[1]

    def part(heads, alpha):
        own = mask if mask is None or mask.shape[1] == 1 else take_heads(mask, heads)
        keys, values = take_key_heads(key, heads, group), take_key_heads(value, heads, group)
        # Bounds are of all the cache's heads: without them every key is read.
        return _attend(take_heads(query, heads), keys, values, alpha=alpha, mask=own, page_bounds=None, **arguments)

    rest = other_heads(heads, query.shape[1])
    (output, tau), (dense_output, dense_tau) = part(heads, alpha), part(rest, 1.0)
    output = merge_heads(output, dense_output, heads)
    if not looked_at:
        return output, None, alpha
    if dense_tau is None:
        # SDPA keeps no tau.
        with torch.no_grad(), implementation("reference"):
            _, dense_tau = part(rest, 1.0)
    alpha = torch.as_tensor(alpha, dtype=torch.float32, device=query.device).expand(1, len(heads))
    alpha = merge_heads(alpha, alpha.new_ones(1, len(rest)), heads)[0]
    return output, merge_heads(tau, dense_tau, heads), alpha


def split_mask(attention_mask: torch.Tensor | None, keys: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask as Transformers hands it to a layer -> (visible, mask) of the contract."""
    if attention_mask is None:
        return None, None
    if is_range(attention_mask):
        return attention_mask[:, 0], None
    if attention_mask.ndim != 4:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; a layer takes a 4-D mask or None")
    if attention_mask.shape[-1] != keys:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, but there are {keys} keys")
    return None, visible_entries(attention_mask)


def _enclosing_range(mask: torch.Tensor) -> torch.Tensor:
    """The range (B or 1, N, 2) from the first to the last key a query sees, from which ALiBi counts its distance."""
    if mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: ALiBi takes a mask that is the same for all heads"
        )
    seen = mask[:, 0].int()
    end = seen.shape[-1] - seen.flip(-1).argmax(-1)
    return torch.stack([seen.argmax(-1), torch.where(seen.any(-1), end, 0)], dim=-1)


def is_range(attention_mask: torch.Tensor) -> bool:
    """Whether a mask is our int32 range of visible keys rather than a matrix."""
    return attention_mask.dtype == torch.int32 and attention_mask.ndim == 4 and attention_mask.shape[-1] == 2


def is_own_matrix(attention_mask: torch.Tensor | None) -> bool:
    """Whether a mask is a matrix of our own, to which documents are still to be added."""
    return attention_mask is not None and attention_mask.dtype == torch.uint8


def visible_entries(attention_mask: torch.Tensor) -> torch.Tensor:
    """A 4-D bool or additive float mask -> bool, True is visible.

    Raises:
        ValueError: for a float mask with entries other than 0 and a large negative number: a bias, it would be lost.
    """
    if attention_mask.dtype == torch.bool or is_own_matrix(attention_mask):
        return attention_mask.bool()
    if not attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask is {attention_mask.dtype}; a 4-D mask is bool (True is visible) or float (0 or -inf)"
        )
    seen = attention_mask == 0
    if not torch.compiler.is_compiling():
        lowest = torch.finfo(attention_mask.dtype).min
        if bool((~seen & (attention_mask > lowest / 2)).any()):
            raise ValueError("a float attention_mask may hold 0 and -inf only; sparse attention adds no other bias")
    return seen


# The functions Transformers composes its masks from that say no more than what the range below holds. Documents are
# rebuilt from position_ids by the model, so the packed ones are among them.
_STRUCTURED = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "and_masks.<locals>.and_mask",
    "sliding_window_overlay.<locals>.inner_mask",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
}


def _is_structured(mask_function: Callable) -> bool:
    if mask_function.__qualname__ not in _STRUCTURED:
        return False
    parts = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
    return all(_is_structured(part) for part in parts if callable(part) and hasattr(part, "__qualname__"))


def sparse_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Registered as the AttentionMaskInterface of every map; see the legend at the top for what it returns.

    Args:
        attention_mask: (B, seen keys) bool padding mask, or None.
        local_size: sliding window, or None.
    """
    config = kwargs.get("config")
    if config is not None and getattr(config, "sparse_attention", None) is None:
        raise ValueError(
            f"{type(config).__name__} is of a dense model: it says nothing of alpha or scale, and its attention may "
            "not be ours at all. Load it with AutoModelForCausalLM.from_pretrained(..., attn_implementation=<map>), "
            "which gives the sparse class of a supported family, or convert it with `hf-sparse-attention convert`"
        )
    compiling = torch.compiler.is_compiling()
    causal = "allow_is_bidirectional_skip" not in kwargs
    structured = not use_vmap and (causal or local_size is None) and (compiling or _is_structured(mask_function))
    known, last = Padding.NONE, kv_length
    if attention_mask is not None:
        # While compiling the padding's values cannot be looked at: it could have holes, which a range cannot hold.
        structured = structured and not compiling
        known = padding_of(attention_mask) if structured else Padding.ANY
        structured = known != Padding.ANY
        # Keys after those it speaks of are not written yet.
        last = min(max(attention_mask.shape[-1] - kv_offset, 0), kv_length)
    if not structured:
        matrix = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
        return matrix.to(torch.uint8)
    window = local_size if local_size is not None and kv_length >= local_size else None
    from_start = causal and window is None and q_length > 1 and kv_offset == 0 and _is_zero(q_offset, compiling)
    if from_start and last >= q_length and (known == Padding.NONE or bool(attention_mask[:, :q_length].all())):
        return None
    own = (torch.arange(q_length, device=device) + (q_offset - kv_offset))[None]
    end = own + 1 if causal else torch.full_like(own, kv_length)
    start = torch.zeros_like(own) if window is None else own - (window - 1)
    if known != Padding.NONE:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        count = padding.sum(-1, keepdim=True)
        first = last - count if known == Padding.LEFT else padding.int().argmax(-1, keepdim=True)
        start, end = torch.maximum(start, first), torch.minimum(end, first + count)
    start, end = torch.broadcast_tensors(start.clamp(0, last), end.clamp(0, last))
    return torch.stack([start, end], dim=-1).to(torch.int32)[:, None]


def _is_zero(offset: int | torch.Tensor, compiling: bool) -> bool:
    """A static cache's offset is a tensor, whose value cannot be looked at while compiling."""
    if isinstance(offset, torch.Tensor):
        return not compiling and int(offset) == 0
    return offset == 0


def register() -> None:
    """Makes every map an `attn_implementation`; function and mask always together, or padding would be lost."""
    for name in MAPS:
        AttentionInterface.register(name, sparse_attention_forward)
        AttentionMaskInterface.register(name, sparse_attention_mask)
