"""The kernels as `torch.library` operators, for torch.compile, CUDA graphs and autograd: one op each way.

Enters: tensors in the contract's shapes. Leaves: output, tau and what the backward needs: lists of tiles, map, mean.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .backward import gradients
from .compiling import compile_together, like
from .configurations import TILE, Configuration, configuration, short_keys, without_pairs
from .forward import attend
from .gather import collect, collects, sparse_limits
from .lists import Lists
from .near import settle, settles
from .refine import refined_threshold
from .short import attend_short, is_short, short_gradients
from .strays import Strays
from .threshold import threshold_bound
from .tiles import BELOW_2, CAUSAL, ENTMAX15, FULL, GENERAL, PER_HEAD, RANGE, SOFTMAX, SPARSEMAX

# Tile lists and their lengths, the same for pairs of tiles, the map of the tiles; strays, their counts and map.
LIST_DTYPES = (torch.int16, torch.int32, torch.int16, torch.int32, torch.uint8, torch.int32, torch.int32, torch.int32)


@dataclass(frozen=True)
class Call:
    """One attention call, as the launchers read it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    # alpha - 1, taken in double precision: float32 would lose digits of it.
    excess: float
    alpha_tensor: torch.Tensor | None
    # The closed form of the threshold; the kernels of a training call may take its powers from other units.
    alpha_kind: int
    scaling: float
    visible: torch.Tensor | None
    visible_strides: tuple[int, int]
    slopes: torch.Tensor | None
    mask: torch.Tensor | None
    mask_strides: tuple[int, int, int, int]
    query_tiles: int
    key_tiles: int
    group: int
    block_dim: int
    two_walks: bool
    descriptors: bool
    constants: dict
    configuration: Configuration
    # Descriptors made so far: both kinds of rows and several kernels read the same tensors.
    made: dict = field(default_factory=dict)

    def sums_means(self, save):
        """Whether the forward sums the values under u: a backward (save) reads that, and it corrects the output.

        Without it the output is right to bfloat16's digits where tau is refined as for a backward.
        """
        known = self.constants["ALPHA_KIND"] in (BELOW_2, ENTMAX15, SPARSEMAX)
        return save or not known or self.query.dtype != torch.bfloat16

    @property
    def heads_at_once(self):
        """How many heads are walked at a time by what reads keys and values."""
        return self.group * self._resident(self.key) if self.configuration.resident else 1

    @property
    def groups_at_once(self):
        """How many key heads are walked at a time by what reads queries, one of the group's heads after the other."""
        return self._resident(self.query)

    def _resident(self, tensor):
        """How many key heads are walked at a time where of each so much is read as two heads of the tensor hold."""
        size = 2 * tensor.shape[2] * tensor.shape[3] * tensor.element_size()
        return min(max(self.configuration.resident // size, 1), self.key.shape[0] * self.key.shape[1])

    @property
    def has_near(self):
        """Whether tiles of the call may be settled by `near`."""
        return settles(self.configuration, self.constants["ALPHA_KIND"], self.query.dtype, self.slopes)

    def descriptor(self, tensor, columns=None):
        """How the copy engine reads blocks of rows of a tensor, or None where they are read through pointers."""
        if not self.descriptors:
            return None
        columns = columns or self.configuration.inner
        # The call, or whoever asks, keeps the tensor alive: its address stays its own.
        known = (id(tensor), columns)
        if known not in self.made:
            made = None
            if describable(tensor, self.block_dim):
                block = [1, 1, columns, self.block_dim]
                made = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
            self.made[known] = made
        return self.made[known]


def _block_dim(head_dim):
    return max(16, 1 << (head_dim - 1).bit_length())


def _tiles(length):
    return (length + TILE - 1) // TILE


def _rows(tensor):
    """Kernels read the last dimension with stride 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def describable(tensor, block_dim):
    """Whether a tensor descriptor can read it: 16-byte aligned rows, and no wide float32 rows."""
    size = tensor.element_size()
    aligned = all(stride * size % 16 == 0 for stride in tensor.stride()[:3]) and tensor.data_ptr() % 16 == 0
    return tensor.stride(-1) == 1 and aligned and 16 <= block_dim * size <= 512


def _kinds(dtype, alpha, alpha_tensor):
    """The closed form of the threshold, and of the powers."""
    kinds = {1.0: SOFTMAX, 1.5: ENTMAX15, 2.0: SPARSEMAX}
    kind = GENERAL if alpha_tensor is not None else kinds.get(alpha, GENERAL)
    if kind == GENERAL and dtype != torch.float32 and not alpha > 2:
        return kind, BELOW_2 if alpha_tensor is None else PER_HEAD
    return kind, kind


def _configuration(query, power_kind, slopes, save):
    row = configuration(query.device, query.element_size(), _block_dim(query.shape[-1]))
    alone = settles(row, power_kind, query.dtype, slopes) or (save and not row.pair_backward)
    return without_pairs(row) if alone else row


def takes_softmax(query, key, value):
    """Whether a training call of alpha 1 is one of few keys, in half precision: others are SDPA's."""
    halves = all(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in (query, key, value))
    most = short_keys(query.device, query.element_size(), _block_dim(query.shape[-1]))
    return halves and is_short(most, query.shape[2], key.shape[2])


def describe(query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, save=False):
    """Everything the launchers need to know about a call."""
    head_dim = query.shape[-1]
    block_dim = _block_dim(head_dim)
    alpha_kind, power_kind = _kinds(query.dtype, alpha, alpha_tensor)
    visible_strides = (0, 0)
    range_kind = CAUSAL if causal else FULL
    if visible is not None:
        range_kind = RANGE
        visible = visible.to(torch.int32)
        visible = visible if visible.stride(-1) == 1 else visible.contiguous()
        visible_strides = (0 if visible.shape[0] == 1 else visible.stride(0), visible.stride(1))
    mask_strides = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]).view(torch.uint8)
        mask_strides = mask.stride()
    precision = "tf32"
    if query.dtype == torch.float32:
        # Three tf32 products nearly keep float32's accuracy, but hold operands twice: too much for the widest heads.
        precision = "tf32x3" if block_dim <= 128 else "ieee"
    constants = {
        "GROUP": query.shape[1] // key.shape[1],
        "ALPHA_KIND": power_kind,
        "RANGE_KIND": range_kind,
        "HAS_ALPHA": alpha_tensor is not None,
        "HAS_SLOPES": slopes is not None,
        "HAS_MASK": mask is not None,
        "BLOCK_D": block_dim,
        "EVEN_D": block_dim == head_dim,
        "PRECISION": precision,
        # Above alpha = 2 a slope hangs on the last bits of a score, which must come out alike in every kernel.
        "enable_fp_fusion": not alpha > 2,
    }
    return Call(
        query=_rows(query),
        key=_rows(key),
        value=_rows(value),
        # Powers of two where it is softmax.
        excess=1 / math.log(2) if alpha_kind == SOFTMAX else alpha - 1.0,
        alpha_tensor=alpha_tensor,
        alpha_kind=alpha_kind,
        scaling=scaling,
        visible=visible,
        visible_strides=visible_strides,
        slopes=slopes,
        mask=mask,
        mask_strides=mask_strides,
        query_tiles=_tiles(query.shape[2]),
        key_tiles=_tiles(key.shape[2]),
        group=query.shape[1] // key.shape[1],
        block_dim=block_dim,
        # Slopes u grow without bound at the edge of the support for alpha > 2, and float32 is held to float32.
        two_walks=query.dtype == torch.float32 or (alpha_kind == GENERAL and (alpha_tensor is not None or alpha > 2)),
        descriptors=describable(query, block_dim) and describable(key, block_dim) and describable(value, block_dim),
        constants=constants,
        configuration=_configuration(query, power_kind, slopes, save),
    )


def _forward(
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
    save: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    call = describe(query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, save)
    if is_short(call.configuration.short_keys, query.shape[2], key.shape[2]):
        return _forward_short(call, save)
    if call.alpha_kind == SOFTMAX:
        raise ValueError(f"softmax of {key.shape[2]} keys: these kernels compute that of few keys alone")
    with torch.cuda.device_of(query):
        strayed = collects(call.configuration, call.group, query.shape[2], call.key_tiles, save)
        variant = (
            query.device, query.dtype, save, call.descriptors, id(call.configuration), strayed,
            *call.constants.values(),
        )  # fmt: skip
        compile_together(variant, query.device, lambda: _launch_all(call, save))
        out, tau, mean, lists, strays = _launch_forward(call, save)
    if not save:
        # Without a backward nothing but the result outlives the call.
        return out, tau, tau.new_empty(0), *(tau.new_empty(0, dtype=dtype) for dtype in LIST_DTYPES)
    pairs, pair_counts = lists.pairs, lists.pair_counts
    if pairs is None:
        pairs, pair_counts = (tau.new_empty(0, dtype=dtype) for dtype in LIST_DTYPES[2:4])
    kept = [tau.new_empty(0, dtype=dtype) for dtype in LIST_DTYPES[5:]]
    if strays is not None:
        kept = [strays.pool, strays.counts, strays.tile_map]
    return out, tau, mean, lists.tiles, lists.counts, pairs, pair_counts, lists.tile_map, *kept


def _of_few_keys(call):
    """The call as `short/` computes it: its tiles are small, float32 products of them need no tensor cores."""
    if call.query.dtype != torch.float32:
        return call
    return replace(call, constants=call.constants | {"PRECISION": "ieee"})


def _forward_short(call, save):
    """The same of a call whose keys are few: what is kept for the backward is tau."""
    call = _of_few_keys(call)
    device = call.query.device
    with torch.cuda.device_of(call.query):
        variant = (
            "short", device, call.query.dtype, save, call.key_tiles, id(call.configuration), *call.constants.values()
        )  # fmt: skip
        compile_together(variant, device, lambda: _launch_short(_without_memory(call), save))
        out, tau = attend_short(call)
    return out, tau, tau.new_empty(0), *(tau.new_empty(0, dtype=dtype) for dtype in LIST_DTYPES)


def _launch_short(call, save):
    out, tau = attend_short(call)
    if save:
        short_gradients(call, out, tau, call.alpha_tensor is not None)


def _without_memory(call):
    tensors = ("query", "key", "value", "alpha_tensor", "visible", "slopes", "mask")
    return replace(call, **{name: like(getattr(call, name)) for name in tensors}, made={})


def _launch_forward(call, save):
    limits = sparse_limits(call, save)
    near = settle(call, save, limits[0])
    bound, lists = threshold_bound(call, save, *limits, near)
    strays = collect(call, bound, lists, save, near)
    point = refined_threshold(call, bound, lists, save, strays)
    return *attend(call, point, lists, save, strays, near), lists, strays


def _launch_all(call, save):
    """Launches, on tensors without memory, whatever a call and its backward launch."""
    call = _without_memory(call)
    out, tau, mean, lists, strays = _launch_forward(call, save)
    if save:
        gradients(call, out, tau, mean, lists, call.alpha_tensor is not None, strays)


def _forward_fake(query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, save):
    batch, heads, queries, head_dim = query.shape
    out = query.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)
    tau = query.new_empty((batch, heads, queries), dtype=torch.float32)
    config = _configuration(query, _kinds(query.dtype, alpha, alpha_tensor)[1], slopes, save)
    if not save or is_short(config.short_keys, queries, key.shape[2]):
        return out, tau, tau.new_empty(0), *(tau.new_empty(0, dtype=dtype) for dtype in LIST_DTYPES)
    query_tiles, key_tiles = _tiles(queries), _tiles(key.shape[2])
    shapes = [(batch, heads, query_tiles, key_tiles), (batch, heads, query_tiles), (0,), (0,)]
    if config.paired:
        pairs = (queries + 2 * TILE - 1) // (2 * TILE)
        shapes[2:] = [(batch, heads, pairs, key_tiles), (batch, heads, pairs)]
    shapes.append((batch, heads, key_tiles, query_tiles))
    if collects(config, heads // key.shape[1], queries, key_tiles, True):
        room = config.stray_room
        shapes += [
            (batch, heads, queries, 2 * room),
            (batch, heads, query_tiles),
            (batch, heads, key_tiles, query_tiles),
        ]
    else:
        shapes += [(0,)] * 3
    lists = [query.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, LIST_DTYPES, strict=True)]
    return out, tau, torch.empty_like(out, dtype=torch.float32), *lists


def _gradients(
    grad_out: torch.Tensor,
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
    tau: torch.Tensor,
    mean: torch.Tensor,
    tiles: torch.Tensor,
    counts: torch.Tensor,
    pairs: torch.Tensor,
    pair_counts: torch.Tensor,
    tile_map: torch.Tensor,
    stray_pool: torch.Tensor,
    stray_counts: torch.Tensor,
    stray_map: torch.Tensor,
    alpha_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    call = describe(query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, save=True)
    with torch.cuda.device_of(query):
        if tiles.numel() == 0:
            # The forward made no lists: it was that of few keys.
            call = _of_few_keys(call)
            dquery, dkey, dvalue, dalpha = short_gradients(call, _rows(grad_out), tau, alpha_gradient)
            return dquery, dkey, dvalue, tau.new_empty(0) if dalpha is None else dalpha
        paired = pairs.numel() > 0
        lists = Lists(tiles, counts, pairs if paired else None, pair_counts if paired else None, tile_map)
        strays = Strays(stray_pool, stray_counts, stray_map) if stray_pool.numel() > 0 else None
        dquery, dkey, dvalue, dalpha = gradients(call, _rows(grad_out), tau, mean, lists, alpha_gradient, strays)
    return dquery, dkey, dvalue, tau.new_empty(0) if dalpha is None else dalpha


def _gradients_fake(
    grad_out, query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, tau, mean, tiles, counts,
    pairs, pair_counts, tile_map, stray_pool, stray_counts, stray_map, alpha_gradient,
):  # fmt: skip
    def like(tensor):
        batch, heads, length, head_dim = tensor.shape
        return tensor.new_empty((batch, length, heads, head_dim)).transpose(1, 2)

    return like(query), like(key), like(value), tau.new_empty(query.shape[1] if alpha_gradient else 0)


def _setup_context(ctx, inputs, output):
    query, key, value, alpha, alpha_tensor, scaling, causal, visible, slopes, mask, save = inputs
    out, *kept = output
    ctx.mark_non_differentiable(*kept)
    # The outputs without a gradient are large: no zeros are made for them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, alpha_tensor, visible, slopes, mask, *kept)
    ctx.alpha, ctx.scaling, ctx.causal, ctx.save = alpha, scaling, causal, save


def _backward(ctx, grad_out, *_):
    query, key, value, alpha_tensor, visible, slopes, mask, *kept = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 11
    if not ctx.save:
        raise RuntimeError("entmax_forward was called with save=False: it kept nothing for a backward")
    alpha_gradient = alpha_tensor is not None and ctx.needs_input_grad[4]
    dquery, dkey, dvalue, dalpha = entmax_backward(
        grad_out, query, key, value, ctx.alpha, alpha_tensor, ctx.scaling, ctx.causal, visible, slopes, mask,
        *kept, alpha_gradient,
    )  # fmt: skip
    dalpha = dalpha.to(alpha_tensor.dtype) if alpha_gradient else None
    return dquery, dkey, dvalue, None, dalpha, None, None, None, None, None, None


def _twice(ctx, *_):
    raise NotImplementedError("entmax attention in Triton has no second derivative: use implementation('reference')")


def _vmap(info, in_dims, *arguments):
    raise NotImplementedError(
        "entmax attention has no vmap rule: it is batched already, fold the mapped dimension into the batch dimension"
    )


def _register(name, schema, implementation, fake):
    # The plain registration: `torch.library.custom_op` adds a check for aliased outputs to every call.
    qualified = f"hf_sparse_attention::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.hf_sparse_attention, name).default


_CALL = "float alpha, Tensor? alpha_tensor, float scaling, bool causal, Tensor? visible, Tensor? slopes, Tensor? mask"
entmax_forward = _register(
    "entmax_forward",
    f"(Tensor query, Tensor key, Tensor value, {_CALL}, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
entmax_backward = _register(
    "entmax_backward",
    f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, {_CALL}, Tensor tau, Tensor mean, Tensor tiles,"
    " Tensor counts, Tensor pairs, Tensor pair_counts, Tensor tile_map, Tensor stray_pool, Tensor stray_counts,"
    " Tensor stray_map, bool alpha_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)
torch.library.register_autograd("hf_sparse_attention::entmax_forward", _backward, setup_context=_setup_context)
torch.library.register_vmap("hf_sparse_attention::entmax_forward", _vmap)
torch.library.register_autograd("hf_sparse_attention::entmax_backward", _twice)
