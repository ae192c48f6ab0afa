"""Seeded random attention calls for the kernels: every mask, dtype, alpha, head grouping, odd lengths and strides."""

import random
from dataclasses import dataclass, field

import torch

ALPHAS = (1.5, 1.5, 1.5, 2.0, 2.0, 1.1, 1.25, 1.333, 1.75, 3.0, 4.0, "heads")
HEAD_DIMS = (8, 16, 32, 64, 80, 128, 256)
MASKS = ("causal", "full", "left", "right", "packed", "window", "slopes", "slopes_window", "ragged", "boolean")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Case:
    """One call: tensors, keyword arguments and a name that says what it is."""

    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    arguments: dict = field(default_factory=dict)


def _tensor(draw, heads_first, batch, heads, length, dim, scale, dtype, device, generator):
    # Half of the tensors are views as Transformers makes them: (batch, length, heads, dim) transposed.
    if heads_first:
        tensor = torch.randn(batch, heads, length, dim, generator=generator, device=device)
    else:
        tensor = torch.randn(batch, length, heads, dim, generator=generator, device=device).transpose(1, 2)
    return (tensor * scale).to(dtype)


def random_case(
    seed,
    *,
    device="cpu",
    lengths=(1, 7, 63, 64, 65, 111, 128, 130, 200),
    few=None,
    budget=1 << 40,
    dtypes=DTYPES,
    dtype=None,
    mask=None,
):
    """The call number `seed`; lengths to draw from, budget the largest batch * heads * queries * keys.

    few: numbers of queries to draw from, where they are not lengths.
    """
    draw = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = dtype or draw.choice(dtypes)
    mask = mask or MASKS[seed % len(MASKS)]
    alpha = draw.choice(ALPHAS)
    group, groups, batch = draw.choice((1, 2, 4)), draw.choice((1, 2)), draw.choice((1, 2))
    dim = draw.choice(HEAD_DIMS)
    queries = draw.choice(few or lengths)
    keys = queries if draw.random() < 0.4 else draw.choice(lengths)
    while batch * group * groups * queries * keys > budget and group * groups * batch > 1:
        group, groups, batch = (group // 2 or 1), (groups // 2 or 1), (batch // 2 or 1)
    while group * groups * batch * queries * keys > budget:
        queries, keys = max(queries // 2, 1), max(keys // 2, 1)
    heads = group * groups
    heads_first = draw.random() < 0.5
    scale = draw.choice((0.2, 1.0, 1.0, 3.0))
    make = [
        _tensor(draw, heads_first, batch, count, length, dim, size, dtype, device, generator)
        for count, length, size in (
            (heads, queries, scale),
            (groups, keys, 1.0),
            (groups, keys, 1.0),
            (heads, queries, 1.0),
        )
    ]
    arguments = {"alpha": alpha}
    if alpha == "heads":
        arguments["alpha"] = torch.tensor([draw.choice((1.2, 1.5, 1.7, 2.0)) for _ in range(heads)], device=device)
    if draw.random() < 0.2:
        arguments["scaling"] = draw.choice((0.05, 0.3))
    position = torch.arange(queries, device=device) + keys - queries
    ends = (position + 1).clamp(0, keys).expand(batch, queries)
    starts = torch.zeros_like(ends)

    def per_batch(low, high):
        return torch.tensor([draw.randint(low, max(low, high)) for _ in range(batch)], device=device)[:, None]

    if mask == "full":
        arguments["causal"] = False
    elif mask == "left":
        starts = starts + per_batch(0, keys - 1)
    elif mask == "right":
        ends = torch.minimum(ends, per_batch(1, keys))
    elif mask == "packed":
        length = draw.choice((1, 5, 50, 64, 100, 300))
        starts = starts + (position.clamp(min=0) // length * length)
    elif mask in ("window", "slopes_window"):
        starts = (ends - draw.choice((1, 3, 64, 100, 500))).clamp(min=0)
    elif mask == "ragged":
        starts = torch.randint(-3, keys + 3, (batch, queries), generator=generator, device=device)
        ends = starts + torch.randint(-2, keys + 3, (batch, queries), generator=generator, device=device)
    elif mask == "boolean":
        shape = draw.choice(((1, 1, queries, keys), (batch, heads, queries, keys), (batch, 1, 1, keys)))
        arguments["mask"] = torch.rand(shape, generator=generator, device=device) < draw.choice((0.1, 0.5, 0.9))
        arguments["causal"] = draw.random() < 0.5
    if mask in ("slopes", "slopes_window"):
        arguments["slopes"] = torch.tensor(
            [draw.choice((0.0, 1.0, 0.5, 1 / 3, 0.02)) for _ in range(heads)], device=device
        )
    if mask not in ("causal", "full", "boolean", "slopes"):
        arguments["visible"] = torch.stack([starts, ends], -1).to(draw.choice((torch.int32, torch.int64)))
    name = (
        f"{seed} {mask} {str(dtype).split('.')[-1]} alpha={alpha} batch={batch} heads={heads}/{groups} "
        f"queries={queries} keys={keys} dim={dim}"
    )
    return Case(name, *make, arguments)


def run(attention, case, dtype=None):
    """(output, dquery, dkey, dvalue, dalpha or nothing) and tau of one implementation, inputs cast to dtype first."""
    tensors = [
        tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (case.query, case.key, case.value)
    ]
    arguments = dict(case.arguments)
    wanted = list(tensors)
    if isinstance(arguments["alpha"], torch.Tensor):
        alpha = arguments["alpha"].detach().to(dtype or arguments["alpha"].dtype).requires_grad_()
        arguments["alpha"] = alpha
        wanted.append(alpha)
    out, tau = attention(*tensors, **arguments)
    gradients = torch.autograd.grad(out, wanted, case.gradient.to(out.dtype))
    return [out.detach(), *gradients], tau


def relative_error(found, exact):
    """||found - exact|| / ||exact|| in float64; NaN anywhere gives NaN."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()
