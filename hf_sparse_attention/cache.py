"""Caches that keep bounds of their keys, with which decoding reads only pages that can hold weight; and what a model
asks of any cache before it writes to it. Enter keys and values as Transformers hands them to a cache's layer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer

# Shapes: B batch, G key heads, K keys, P pages, D head size.

# Keys of a page: the tile of the kernels.
PAGE = 64
_CPU = torch.device("cpu")
# Numbers that are kept with the codes of a page.
BALL = 3
# Numbers of the state that the kernels keep with the bounds of a layer, zeros at first.
STATE = 3
# A growing cache is copied whenever it is full: every 1/32 of its length, so that the room costs 3 % of its memory.
ROOM = 32
LEAST_ROOM = 256


class _BoundedLayer:
    """Mixin before a layer of Transformers: bounds of every page of 64 keys.

    They are the smallest and the largest value of every channel, the keys' own and in their dtype, so nothing is
    rounded; and a ball that holds the keys: its middle as codes of a byte a channel, and three numbers: their unit, a
    power of two, the largest distance of a key from the middle and the middle's length, both rounded up. A page has
    bounds from the moment it is whole; keys after the last whole page are always read.
    """

    lower: torch.Tensor | None = None
    upper: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    ball: torch.Tensor | None = None
    # For how many calls the bounds rest, as they did not help, and two counters of the kernel that reads them, zero
    # between calls; on the device, where decoding finds that out.
    state: torch.Tensor | None = None

    def bounds(self) -> tuple[torch.Tensor, ...] | None:
        """(lower, upper, codes, ball, state): (B, G, P, D) and ball (B, G, P, 3); None before the first key."""
        return None if self.lower is None else (self.lower, self.upper, self.codes, self.ball, self.state)

    def _make_bounds(self, key_states: torch.Tensor, keys: int) -> None:
        shape = (*key_states.shape[:2], max(keys // PAGE, 1), key_states.shape[-1])
        self.lower, self.upper = key_states.new_zeros(shape), key_states.new_zeros(shape)
        self.codes = torch.zeros(shape, dtype=torch.int8, device=key_states.device)
        self.ball = torch.zeros((*shape[:3], BALL), dtype=torch.float32, device=key_states.device)
        self.state = torch.zeros(STATE, dtype=torch.int32, device=key_states.device)

    def _reorder_bounds(self, take) -> None:
        if self.lower is not None:
            self.lower, self.upper, self.codes, self.ball = (take(tensor) for tensor in self.bounds()[:4])

    def _drop_bounds(self) -> None:
        self.lower = self.upper = self.codes = self.ball = self.state = None

    def offload(self) -> None:
        raise ValueError(f"{type(self).__name__} does not move to the CPU: use a DynamicCache with offloading=True")


class BoundedDynamicLayer(_BoundedLayer, DynamicLayer):
    """A `DynamicLayer` with bounds that grows into spare room instead of being copied for every token.

    `keys` and `values` are views of what was written, as in a `StaticLayer`: a shallow copy of the cache shares them.
    Others may be put in their place; what is written into them leaves their bounds as they are.
    """

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends (B, G, N, D) and returns all keys and values, (B, G, K, D), without copying them.

        Raises:
            ValueError: for keys that want a gradient, which what is written in place cannot give.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "a cache with bounds is written in place and keeps no gradient: call the model under "
                "torch.no_grad(), or use a DynamicCache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = bounded = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._is_replaced():
            self._room, bounded = None, 0
            self._drop_bounds()
        self._reserve(old, new, key_states, value_states)
        keys, values = self._room
        keys[:, :, old:new] = key_states
        values[:, :, old:new] = value_states
        self.keys, self.values = keys[:, :, :new], values[:, :, :new]
        update_page_bounds(self.keys, *self.bounds()[:4], None, bounded, new)
        return self.keys, self.values

    def _is_replaced(self) -> bool:
        """Whether other keys or values were put in the place of what was shown last, as eviction does."""
        if self._room is None or torch.compiler.is_compiling():
            return False
        return any(
            (held.data_ptr(), held.stride(), held.shape[:2]) != (room.data_ptr(), room.stride(), room.shape[:2])
            for held, room in zip((self.keys, self.values), self._room, strict=True)
        )

    def _reserve(self, old: int, new: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self._room is not None and new <= self._room[0].shape[2]:
            return
        size = -(-(new + max(new // ROOM, LEAST_ROOM)) // PAGE) * PAGE
        known = self.bounds()
        self._make_bounds(key_states, size)
        if known is not None:
            for tensor, before in zip(self.bounds()[:4], known[:4], strict=True):
                tensor[:, :, : before.shape[2]] = before
            self.state = known[4]
        room = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            room.append(states.new_empty((*states.shape[:2], size, states.shape[-1])))
            if old:
                room[-1][:, :, :old] = held
        self._room = tuple(room)

    def _take(self, take) -> None:
        """Takes other rows of the batch, spare room and bounds included."""
        if self.get_seq_length() > 0:
            length = self.get_seq_length()
            self._room = tuple(take(tensor) for tensor in self._room)
            self.keys, self.values = (tensor[:, :, :length] for tensor in self._room)
            self._reorder_bounds(take)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(lambda tensor: tensor[indices, ...])

    def reset(self) -> None:
        # Dropped first: older releases of Transformers would keep the length and only zero the keys.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        self._room = None
        self._drop_bounds()


class BoundedStaticLayer(_BoundedLayer, StaticLayer):
    """A `StaticLayer` with bounds; all of its tensors keep their address, as torch.compile and CUDA graphs want it."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._make_bounds(self.keys, self.max_cache_len)
        if not torch.compiler.is_compiling():
            for tensor in self.bounds():
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes (B, G, N, D) behind what was written and returns the whole cache, (B, G, max_cache_len, D)."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        update_page_bounds(keys, *self.bounds()[:4], self.cumulative_length, 0, key_states.shape[-2])
        return keys, values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._reorder_bounds(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))


class BoundedDynamicCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers keep bounds of their keys; pass it as `past_key_values`.

    Args:
        config: the model's config, which says which layers slide: those keep no bounds.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.layers = [BoundedDynamicLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


class BoundedStaticCache(StaticCache):
    """A `StaticCache` whose full-attention layers keep bounds of their keys; pass it as `past_key_values`.

    Args:
        config: the model's config, which says which layers slide: those keep no bounds.
        max_cache_len: the most tokens it holds, prompt and generated ones together.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int):
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.layers = [
            BoundedStaticLayer(max_cache_len) if type(layer) is StaticLayer else layer for layer in self.layers
        ]


def page_bounds(cache: Cache | None, layer_idx: int) -> _BoundedLayer | None:
    """The layer of a cache that keeps bounds, to be asked for them once it is updated; None if this one does not."""
    if cache is None or layer_idx >= len(getattr(cache, "layers", ())):
        return None
    layer = cache.layers[layer_idx]
    return layer if isinstance(layer, _BoundedLayer) else None


def check_cache(
    cache, config: PreTrainedConfig, inputs: torch.Tensor, attention_mask: torch.Tensor | None, model: nn.Module
) -> None:
    """Whether a model of this config can go on from this cache with these inputs (B, N, ...).

    Raises:
        TypeError: for something that is not a decoder's cache.
        ValueError: for a cache with another number of layers, on another device, for another batch, of layers that
            differ, without room for the inputs, or one that does not hold what the attention mask, (B, K) or
            (B, H or 1, N, K), speaks of.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(f"past_key_values is a {type(cache).__name__}; sparse attention takes a decoder's Cache")
    if torch.compiler.is_compiling():
        return
    layers, expected = cache.layers, config.num_hidden_layers
    if len(layers) > expected or (len(layers) < expected and cache.layer_class_to_replicate is None):
        raise ValueError(
            f"past_key_values has {len(layers)} layers, the model {expected}: it is of another model. Make one with "
            f"{type(cache).__name__}(config=model.config, ...)"
        )
    for index, layer in enumerate(layers):
        if not isinstance(layer, CacheLayerMixin):
            raise TypeError(f"layer {index} of past_key_values is a {type(layer).__name__}, which keeps no keys")
    _check_layers(cache, expected, inputs, model)
    _check_room(cache, inputs.shape[1])
    # A range says where it ends on its device, which is not waited for.
    if attention_mask is not None and (attention_mask.ndim == 2 or attention_mask.dtype != torch.int32):
        _check_length(cache, inputs, attention_mask)


def _check_layers(cache: Cache, layers: int, inputs: torch.Tensor, model: nn.Module) -> None:
    """All layers at once, before the first of them is written."""
    filled = {index: layer for index, layer in enumerate(cache.layers) if _holds_keys(layer)}
    lengths = dict.fromkeys(range(layers if filled else 0), 0)
    lengths |= {index: layer.get_seq_length() for index, layer in enumerate(cache.layers)}
    # A static cache counts on its device, which is not waited for.
    known = {index: int(length) for index, length in lengths.items() if getattr(length, "device", _CPU) == _CPU}
    for one, other in pairwise(known):
        if known[one] != known[other]:
            raise ValueError(
                f"past_key_values holds {known[one]} tokens in layer {one} and {known[other]} in layer {other}: a "
                "call was interrupted while it wrote. Make a new cache, or reset() it"
            )
    offloaded = getattr(cache, "offloading", False)
    first = next(iter(filled.values()), None)
    for index, layer in filled.items():
        keys, values = layer.keys, layer.values
        elsewhere = keys.device != inputs.device and (index == 0 or keys.device not in _devices(model))
        if not offloaded and (elsewhere or values.device != keys.device):
            place = keys.device if values.device == keys.device else f"{keys.device} and {values.device}"
            raise ValueError(
                f"past_key_values is on {place} in layer {index}, the input on {inputs.device}: move the input, or "
                "make the cache where the model is"
            )
        alike = [(one.keys.shape[1], one.keys.shape[3], one.keys.dtype) for one in (first, layer)]
        if alike[0] != alike[1] or keys.shape[0] != first.keys.shape[0]:
            raise ValueError(
                f"past_key_values holds keys of shape {tuple(first.keys.shape)} in {first.keys.dtype} in its first "
                f"layer and {tuple(keys.shape)} in {keys.dtype} in layer {index}: they are of different models or "
                "batches. Make a new cache, or reset() it"
            )


def _check_room(cache: Cache, new: int) -> None:
    """Whether so many tokens fit behind those a static cache holds; layers that slide take any number."""
    for layer in cache.layers:
        if not isinstance(layer, StaticLayer) or layer.is_sliding:
            continue
        held, room = layer.get_seq_length(), layer.max_cache_len
        # What is counted on a device is not waited for: there only what fits into no cache of this size is refused.
        known = int(held) if getattr(held, "device", _CPU) == _CPU else 0
        if known + new > room:
            behind = f" behind the {known} that past_key_values holds" if known else ""
            raise ValueError(
                f"the input has {new} tokens{behind}, but the cache has room for {room}: make one with max_cache_len "
                f"of at least {known + new} and as many more as are generated, or a BoundedDynamicCache, which grows"
            )


def _holds_keys(layer) -> bool:
    return layer.is_initialized and layer.keys is not None and layer.keys.ndim == 4


def _devices(model: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


def _check_length(cache: Cache, inputs: torch.Tensor, attention_mask: torch.Tensor) -> None:
    length, covered, sliding = cache.get_seq_length(), attention_mask.shape[-1], any(cache.is_sliding)
    most = max(layer.max_cache_len for layer in cache.layers) if isinstance(cache, StaticCache) else None
    # A static cache may be described whole: its keys that are not written yet are after every query. And what a matrix
    # says of layers that slide differs from layer to layer.
    if covered == most or (attention_mask.ndim == 4 and sliding):
        return
    if most is not None and not sliding and covered > most:
        raise ValueError(f"attention_mask covers {covered} tokens, but the cache has room for {most}")
    if most is not None and attention_mask.ndim == 4:
        raise ValueError(
            f"attention_mask covers {covered} tokens, but layers see all {most} places of a static cache: a matrix "
            "must have a column for each, unseen where nothing is written"
        )
    if isinstance(length, torch.Tensor):
        # A static cache counts on its device. This waits for it, as whoever asks what a caller's padding looks like;
        # the masks of `generate` for such a cache are ranges.
        if length.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        length = int(length)
    if covered != length + inputs.shape[1]:
        raise ValueError(
            f"attention_mask covers {covered} tokens, but the cache holds {length} and the input {inputs.shape[1]}: "
            "it must cover the cached tokens and the new ones"
        )


def check_layer(cache: Cache | None, attention: nn.Module, hidden_states: torch.Tensor) -> None:
    """Whether an attention layer can append the keys of these hidden states (B, N, ...) to its layer of the cache.

    Raises:
        ValueError: if that holds keys of another batch, head size, number of heads or dtype, or on another device.
    """
    index = attention.layer_idx
    if torch.compiler.is_compiling() or index >= len(getattr(cache, "layers", ())):
        return
    layer = cache.layers[index]
    if not _holds_keys(layer):
        return
    heads = attention.config.num_attention_heads // getattr(attention, "num_key_value_groups", 1)
    head_dim = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
    found = tuple(layer.keys.shape)
    # A tensor-parallel rank holds a part of the heads.
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    same_heads = found[1] == heads or (parallel and heads % found[1] == 0)
    if found[0] != hidden_states.shape[0] or found[3] != head_dim or not same_heads:
        raise ValueError(
            f"past_key_values holds keys of shape {found} in layer {index}, this model and input need "
            f"{(hidden_states.shape[0], heads, found[2], head_dim)}: it was filled by another model or for another "
            "batch. Make a new cache, or reset() it"
        )
    if not getattr(cache, "offloading", False) and layer.keys.device != hidden_states.device:
        raise ValueError(
            f"past_key_values is on {layer.keys.device} in layer {index}, which is on {hidden_states.device}"
        )
    # Under autocast, or in layers of several dtypes, the keys' is not known before they are made.
    dtypes = {parameter.dtype for parameter in attention.parameters()} | {hidden_states.dtype}
    if (
        len(dtypes) == 1
        and layer.keys.dtype not in dtypes
        and not torch.is_autocast_enabled(hidden_states.device.type)
    ):
        raise ValueError(
            f"past_key_values holds keys in {layer.keys.dtype} in layer {index}, the model computes in "
            f"{hidden_states.dtype}: it was filled by another model. Make a new cache, or reset() it"
        )


def _update_page_bounds(
    keys: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    codes: torch.Tensor,
    ball: torch.Tensor,
    length: torch.Tensor | None,
    old: int,
    new: int,
) -> None:
    if keys.is_cuda:
        from .kernels.decode.bounds import update_bounds

        update_bounds(keys, lower, upper, codes, ball, length, old, new)
        return
    if length is not None:
        old, new = int(length) - new, int(length)
    first, last = old // PAGE, new // PAGE
    if last > first:
        pages = keys[:, :, first * PAGE : last * PAGE].unflatten(2, (last - first, PAGE))
        torch.amin(pages, 3, out=lower[:, :, first:last])
        torch.amax(pages, 3, out=upper[:, :, first:last])
        codes[:, :, first:last], ball[:, :, first:last] = _balls(pages.float())


def _balls(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (..., D) and numbers (..., 3) of pages (..., PAGE, D) in float32, as in the kernel but around the mean."""
    broken = ~torch.isfinite(pages).flatten(-2).all(-1)
    pages = pages.masked_fill(broken[..., None, None], 0.0)
    exponent = torch.frexp(pages.abs().amax((-2, -1)) / 127).exponent.clamp(min=-125)
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    pages = pages / unit[..., None, None]
    codes = pages.mean(-2).round()
    distance = pages - codes.unsqueeze(-2)
    # Squares of the smallest numbers would vanish: in units of the largest.
    largest = distance.abs().amax((-2, -1))
    largest = torch.where(largest > 0, largest, 1.0)
    farthest = (distance / largest[..., None, None]).square().sum(-1).amax(-1).sqrt() * largest
    radius = (farthest * unit * 1.0001).masked_fill(broken, torch.nan)
    return codes.to(torch.int8), torch.stack([unit, radius, codes.norm(dim=-1) * unit * 1.0001], -1)


# Bounds of the pages that became whole when the keys grew from `old` to `new`. With a length tensor, as a static cache
# counts, it says how many keys there are now and `new` how many were appended: nothing waits for its value.
_SCHEMA = (
    "(Tensor keys, Tensor(a!) lower, Tensor(b!) upper, Tensor(c!) codes, Tensor(d!) ball, Tensor? length, int old, "
    "int new) -> ()"
)
torch.library.define("hf_sparse_attention::update_page_bounds", _SCHEMA)
torch.library.impl("hf_sparse_attention::update_page_bounds", "CompositeExplicitAutograd", _update_page_bounds)
torch.library.register_fake("hf_sparse_attention::update_page_bounds", lambda *arguments: None)
update_page_bounds = torch.ops.hf_sparse_attention.update_page_bounds.default
