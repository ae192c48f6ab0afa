"""A sparse model and windows of text -> per layer and head the keys that carry weight, exact zeros, empty tiles,
factor and alpha, as means and by the query's position. Nothing of size queries x keys is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from .. import reference
from ..attention import record
from ..tasks.perplexity import position_edges

# Side of the tiles whose emptiness is counted, that of the kernels.
TILE = 64
NUMBERS = {
    "support": "keys that carry weight, mean over queries",
    "zeros": "share of the visible keys whose weight is exactly 0",
    "block_sparsity": f"share of the visible {TILE} x {TILE} tiles without any weight",
    "scale": "factor on the query, mean over queries",
    "alpha": "alpha of entmax; 1 is softmax",
}
# Two buckets an octave, far beyond any context.
_EDGES = position_edges(2**24)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def measure_attention(model: nn.Module, windows: torch.Tensor) -> list[dict]:
    """What the attention of a sparse model does on windows (windows, tokens) of token ids, one forward pass each.

    Returns:
        per sparse layer {"layer", "visible", and the names of `NUMBERS` with one number per head, "positions"}.
        "positions" has a row per range of positions, {"start", "end", "visible", "support", "scale"}, the last two
        with one number per head: positions count the queries of a window that see a key, from 1, in [start, end).

    Raises:
        ValueError: if the model has no sparse layer, so that there is nothing to measure, or its queries and keys are
            not finite.
    """
    measures = Measures()
    shown = 0.2 if sys.stderr.isatty() else 30
    with record(measures), evaluating(model):
        for window in tqdm(windows, desc="looking", unit="window", mininterval=shown):
            model(window[None].to(model.device), use_cache=False, logits_to_keep=1)
    if not measures.layers:
        raise ValueError(f"{type(model).__name__} has no sparse attention: every visible key carries weight")
    return measures.rows()


class Measures:
    """Sums over queries of the sparse layers, filled by `attention.record`."""

    def __init__(self):
        self.layers: dict[int, dict] = {}

    def __call__(self, module, query, key, tau, *, alpha, query_scale, **structure) -> None:
        if not module.is_sparse:
            return
        check_finite(module.layer_idx, query, key)
        batch, heads, queries, _ = query.shape
        sums = self.layers.setdefault(
            module.layer_idx,
            {name: torch.zeros(heads, dtype=torch.float64) for name in ("support", "occupied", "scale", "alpha")}
            | {"visible": 0.0, "tiles": 0.0, "queries": 0, "calls": 0, "positions": {}},
        )
        # Zero queries weigh all keys alike: what has weight then is what is visible, whatever the mask.
        blank, one_key = torch.zeros_like(query[:, :1]), key[:, :1]
        everything = {**structure, "slopes": None, "alpha": 1.0}
        _, blank_tau = reference.attention(blank, one_key, one_key, **everything)
        visible = reference.support_size(blank, one_key, blank_tau, **everything)
        tiles = reference.block_occupancy(blank, one_key, blank_tau, block=TILE, **everything)
        # On SDPA softmax leaves no tau; it gives weight to every key it sees.
        if tau is None:
            support, occupied = visible.expand(-1, heads, -1), tiles.expand(-1, heads, -1, -1)
        else:
            support = reference.support_size(query, key, tau, alpha=alpha, **structure)
            occupied = reference.block_occupancy(query, key, tau, block=TILE, alpha=alpha, **structure)
        sums["support"] += support.double().sum((0, 2)).cpu()
        sums["occupied"] += occupied.double().sum((0, 2, 3)).cpu()
        sums["visible"] += visible.double().sum().item()
        sums["tiles"] += tiles.double().sum().item()
        scale = None if query_scale is None else query_scale[..., 0].double().expand(batch, heads, queries).cpu()
        sums["scale"] += 1 if scale is None else scale.mean((0, 2))
        sums["alpha"] += torch.as_tensor(alpha, dtype=torch.float64).detach().cpu().expand(heads)
        sums["queries"] += batch * queries
        sums["calls"] += 1
        _add_by_position(sums["positions"], visible[:, 0].cpu(), support.cpu(), scale)

    def rows(self) -> list[dict]:
        """Per layer the numbers of `NUMBERS` as one list over heads each, the mean number of visible keys, and the
        numbers by position."""
        return [
            {
                "layer": layer,
                "visible": sums["visible"] / sums["queries"],
                "support": (sums["support"] / sums["queries"]).tolist(),
                "zeros": (1 - sums["support"] / sums["visible"]).tolist(),
                "block_sparsity": (1 - sums["occupied"] / sums["tiles"]).tolist(),
                "scale": (sums["scale"] / sums["calls"]).tolist(),
                "alpha": (sums["alpha"] / sums["calls"]).tolist(),
                "positions": [_range(index, *parts) for index, parts in sorted(sums["positions"].items())],
            }
            for layer, sums in sorted(self.layers.items())
        ]


def check_finite(layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises ValueError where scores are no numbers: none of their weights is above 0, which would pass for sparse."""
    if not bool(query.isfinite().all() & key.isfinite().all()):
        raise ValueError(
            f"layer {layer} has queries or keys that are not finite in {query.dtype}: the model's weights are broken, "
            "or they need another dtype (bfloat16 or float32)"
        )


def _add_by_position(positions: dict, visible_BN, support_BHN, scale_BHN) -> None:
    """Adds (queries, visible keys, support (heads,), factor (heads,)) to the range each query's position is in."""
    sees_BN = visible_BN > 0
    position_BN = sees_BN.cumsum(-1)
    bucket_BN = torch.bucketize(position_BN, torch.tensor(_EDGES), right=True) - 1
    support_HBN, heads = support_BHN.double().transpose(0, 1), support_BHN.shape[1]
    for index in bucket_BN[sees_BN].unique().tolist():
        here_BN = sees_BN & (bucket_BN == index)
        count = int(here_BN.sum())
        factor = torch.full((heads,), float(count), dtype=torch.float64)
        if scale_BHN is not None:
            factor = scale_BHN.transpose(0, 1)[:, here_BN].sum(-1)
        new = count, int(visible_BN[here_BN].sum()), support_HBN[:, here_BN].sum(-1), factor, int(position_BN.max())
        old = positions.get(index, (0, 0, 0, 0, 0))
        added = (before + now for before, now in zip(old[:4], new[:4], strict=True))
        positions[index] = (*added, max(old[4], new[4]))


def _range(index: int, count: int, visible: int, support, scale, last: int) -> dict:
    return {
        "start": _EDGES[index],
        # The last range ends where the windows do.
        "end": min(_EDGES[index + 1], last + 1),
        "visible": visible / count,
        "support": [_rounded(value) for value in (support / count).tolist()],
        "scale": [_rounded(value) for value in (scale / count).tolist()],
    }


def _rounded(value: float) -> float:
    """Six significant digits: there are many of these numbers in a file."""
    return float(f"{value:.6g}")


def mean_over_heads(rows: list[dict]) -> dict[str, float]:
    """The mean of every number over layers and heads, and of the visible keys over layers."""
    means = {}
    for name in NUMBERS:
        values = [value for row in rows for value in row[name]]
        means[name] = sum(values) / len(values)
    return means | {"visible": sum(row["visible"] for row in rows) / len(rows)}


def typical_heads(rows: list[dict]) -> list[tuple[int, int]]:
    """Of the first, middle and last layer the head whose support is the median, as (layer, head)."""
    picked = [rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1})]
    return [
        (row["layer"], sorted(range(len(row["support"])), key=row["support"].__getitem__)[len(row["support"]) // 2])
        for row in picked
    ]
