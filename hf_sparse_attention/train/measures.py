"""What a training run looks at on its way: the loss on blocks held out, and how sparse the attention is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..attention import record
from ..reference import support_size
from .packing import IGNORED_LABEL


def held_out_loss(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], accelerator) -> float:
    """Mean loss in nats over the labels of all processes' batches, all processes having equally many."""
    model.eval()
    # Apple's GPUs know no float64.
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=dtype, device=accelerator.device)
    one = torch.ones((), device=accelerator.device)
    with torch.no_grad():
        for batch in batches:
            # Divided by one the loss is the sum over the labels.
            loss = model(**batch, num_items_in_batch=one, use_cache=False).loss
            sums += torch.stack([loss.to(dtype), (batch["labels"] != IGNORED_LABEL).sum().to(dtype)])
    total, labels = accelerator.reduce(sums, "sum").tolist()
    return total / labels


def attention_statistics(
    model: nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the heads and queries of a batch, in one forward pass.

    Returns:
        over all sparse layers: support, the number of keys with a weight; visible, the number of keys that could have
        one; zeros, the mean over the layers of the share of these whose weight is exactly zero; scale, the map's
        factor on the query, 1 without one; head_alpha, the mean alpha, where the heads learn it.
        of each sparse layer: support, zeros, scale and alpha, as "support/7" and so on, the number that of the layer.
    """
    model.eval()
    found: dict[int, list[torch.Tensor]] = {}
    learned: list[bool] = []

    def look(module, query, key, tau, *, query_scale, alpha, visible, causal, **arguments):
        if not module.is_sparse:
            return
        queries, keys = query.shape[2], key.shape[2]
        if visible is None:
            first = keys - queries + 1 if causal else keys
            seen = torch.arange(first, first + queries, device=query.device).clamp(max=keys)[None]
        else:
            seen = (visible[..., 1] - visible[..., 0]).clamp(min=0)
        seen = seen[:, None].expand(query.shape[:3]).float()
        if tau is None:
            support = seen
        else:
            support = support_size(query, key, tau, alpha=alpha, visible=visible, causal=causal, **arguments).float()
        scale = seen.new_ones(()) if query_scale is None else query_scale.float().mean()
        # Of the heads that have the map; the others of a layer are at 1 for good.
        heads = slice(None) if module.sparse_heads is None else list(module.sparse_heads)
        mean_alpha = torch.as_tensor(alpha, device=query.device).float().expand(query.shape[1])[heads].mean()
        learned.append(module.sparse_alpha is not None)
        found[module.layer_idx] = [support.mean(), seen.mean(), scale, mean_alpha]

    # A compiled model would be compiled anew for each look.
    with torch.no_grad(), record(look), torch.compiler.set_stance("force_eager"):
        model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    if not found:
        return {}, {}
    # One copy from the device for all layers.
    table = torch.stack([torch.stack(row) for row in found.values()]).double().cpu()
    support, visible, scale, alpha = table.mean(0).tolist()
    means = {"support": support, "visible": visible, "scale": scale}
    means |= {"head_alpha": alpha} if any(learned) else {}
    layers = {}
    for layer, (support_here, visible_here, *others) in sorted(zip(found, table.tolist(), strict=True)):
        numbers = (support_here, 1 - support_here / visible_here, *others)
        names = ("support", "zeros", "scale", "alpha")
        layers |= {f"{name}/{layer}": number for name, number in zip(names, numbers, strict=True)}
    zeros = [number for name, number in layers.items() if name.startswith("zeros/")]
    return {**means, "zeros": sum(zeros) / len(zeros)}, layers
