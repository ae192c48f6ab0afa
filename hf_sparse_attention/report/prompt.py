"""A model and a prompt -> the attention of every layer and head over the tokens, kept as what is not zero: per query
the keys that carry weight and their weights, and a coarse picture of all queries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .. import reference
from ..attention import record
from ..models import attention_layers
from .measures import check_finite, evaluating

# Shapes: H heads, Q queries that are kept, N tokens, C blocks of tokens, E weights that are kept.

# Blocks along a side of the coarse picture: with 8,192 tokens a block is a tile of the kernels.
BLOCKS = 128
SMALLEST = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer, of some queries.

    Args:
        layer: its number.
        window: keys a query sees at most, its own included; None for all.
        support: (H, Q) how many keys carry weight; every visible one where the layer is softmax.
        kept: (H, Q) how many of these are in `keys`: the heaviest, where they are not all.
        rest: (H, Q) the weight of those that are not; 0 where all are kept.
        keys, weights: (E,) the kept keys and their weights, by head, then query, then key.
        largest: (H, C, C) the largest weight of every block of queries and keys, over all queries; 0 is exactly 0.
    """

    layer: int
    window: int | None
    support: np.ndarray
    kept: np.ndarray
    rest: np.ndarray
    keys: np.ndarray
    weights: np.ndarray
    largest: np.ndarray

    def of_queries(self, chosen: np.ndarray) -> LayerWeights:
        """Some of the queries alone; `chosen` (Q,) bool."""
        entries = np.repeat(np.broadcast_to(chosen, self.kept.shape).ravel(), self.kept.ravel())
        return dataclasses.replace(
            self, support=self.support[:, chosen], kept=self.kept[:, chosen], rest=self.rest[:, chosen],
            keys=self.keys[entries], weights=self.weights[entries],
        )  # fmt: skip


@dataclass(frozen=True)
class PromptAttention:
    """What `look_at_prompt` found.

    Args:
        tokens: the tokens' texts, N of them.
        total: how many tokens the prompt has, of which `tokens` are the first.
        queries: (Q,) the queries whose weights are kept, ascending; the last token is always one of them.
        block: tokens in a block of the coarse picture.
        layers: one `LayerWeights` per sparse layer.
    """

    tokens: list[str]
    total: int
    queries: np.ndarray
    block: int
    layers: list[LayerWeights]

    def matrix(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """(weights (Q, N), visible (Q, N)) of a head; NaN is a weight that was not kept.

        Raises:
            ValueError: for a layer that is not sparse, or a head that is not there.
        """
        found = next((item for item in self.layers if item.layer == layer), None)
        if found is None or not 0 <= head < len(found.kept):
            raise ValueError(f"there is no sparse head {head} of layer {layer} to look at")
        first = found.kept[:head].sum()
        mine = slice(first, first + found.kept[head].sum())
        rows, keys = np.repeat(np.arange(len(self.queries)), found.kept[head]), np.arange(len(self.tokens))
        visible = keys <= self.queries[:, None]
        if found.window is not None:
            visible &= keys > self.queries[:, None] - found.window
        weights = np.where(visible & (found.support > found.kept)[head][:, None], np.nan, 0.0)
        weights[rows, found.keys[mine]] = found.weights[mine]
        return weights, visible


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Each token's text; the tokenizer's own name for it where the text is only a part of a character."""
    texts = []
    for index, (token, name) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        text = tokenizer.decode([token])
        # Alone, some tokenizers decode a word without the space before it.
        before = tokenizer.decode(ids[index - 1 : index])
        both = tokenizer.decode(ids[max(0, index - 1) : index + 1])
        if index and both.startswith(before):
            text = both[len(before) :]
        texts.append(str(name) if "\ufffd" in text or not text else text)
    return texts


def look_at_prompt(
    model: nn.Module,
    tokenizer,
    prompt: str,
    *,
    tokens: int = 256,
    heaviest: int | None = None,
    budget: int | None = None,
    queries: np.ndarray | None = None,
) -> PromptAttention:
    """The attention of a sparse model over the tokens of a prompt, in one forward pass.

    Args:
        prompt: text; its first `tokens` tokens are looked at.
        heaviest: most keys kept per query and head, the heaviest; None keeps every key that carries weight.
        budget: weights kept in all; every second, fourth, ... query is left out until they fit, never the last.
        queries: (Q,) exactly the queries to keep, ascending; then there is no budget.

    Raises:
        ValueError: for a dense model, a prompt of fewer than 2 tokens, attention that is not causal, or queries and
            keys that are not finite.
    """
    if not attention_layers(model):
        raise ValueError(f"{type(model).__name__} has no sparse attention to look at")
    every = tokenizer(prompt)["input_ids"]
    ids = every[:tokens]
    if len(ids) < 2:
        raise ValueError(f"the prompt {prompt!r} has {len(ids)} tokens; attention needs at least 2")
    look = _Look(len(ids), heaviest, budget, queries)
    with record(look), evaluating(model):
        model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    return PromptAttention(token_texts(tokenizer, ids), len(every), look.queries, look.block, look.layers)


class _Look:
    """Filled by `attention.record`, layer by layer."""

    def __init__(self, tokens: int, heaviest: int | None, budget: int | None, queries: np.ndarray | None):
        self.tokens, self.heaviest, self.budget = tokens, heaviest, budget
        self.queries = np.arange(tokens) if queries is None else np.asarray(queries)
        self.block = -(-tokens // BLOCKS)
        self.layers: list[LayerWeights] = []

    def __call__(self, module, query, key, tau, *, alpha, query_scale, **structure) -> None:
        if not module.is_sparse:
            return
        check_finite(module.layer_idx, query, key)
        window = _window(structure, self.tokens)
        softmax = tau is None or (isinstance(alpha, float) and alpha == 1.0)
        if tau is None:
            _, tau = reference.attention(query, key, key[..., :1], alpha=1.0, **structure)
        self.layers.append(self._weights(module.layer_idx, window, softmax, query, key, tau, alpha, structure))
        while self.budget is not None and len(self.queries) > 1 and self._size() > self.budget:
            # Counted from the last query, which is the one that predicts what comes next.
            chosen = np.arange(len(self.queries))[::-1] % 2 == 0
            self.queries = self.queries[chosen]
            self.layers = [layer.of_queries(chosen) for layer in self.layers]

    def _size(self) -> int:
        return sum(len(layer.keys) for layer in self.layers)

    def _weights(self, number, window, softmax, query, key, tau, alpha, structure) -> LayerWeights:
        heads, blocks = query.shape[1], -(-self.tokens // self.block)
        shape = heads, len(self.queries)
        support, rest = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        largest = np.zeros((heads, blocks, blocks), np.float32)
        found = []
        for tile, weights in reference.weight_tiles(query, key, tau, align=self.block, alpha=alpha, **structure):
            # One prompt, the heads in order: (heads, queries, keys).
            weights = weights[0].flatten(0, 1)
            share = heads // key.shape[1]
            of_heads = slice(tile.key_heads.start * share, tile.key_heads.stop * share)
            first, left = tile.queries.start // self.block, tile.keys.start // self.block
            cells = _block_maxima(weights, self.block)
            largest[of_heads, first : first + cells.shape[1], left : left + cells.shape[2]] = cells
            low, high = np.searchsorted(self.queries, (tile.queries.start, tile.queries.stop))
            if low == high:
                continue
            wanted = torch.from_numpy(self.queries[low:high] - tile.queries.start).to(weights.device)
            rows = weights[:, wanted]
            carries = rows > 0
            count = carries.sum(-1)
            kept = _heaviest(rows, carries, count, self.heaviest)
            if softmax:
                position = torch.arange(tile.queries.start, tile.queries.stop, device=rows.device)[wanted] + 1
                count = position.clamp(max=window or self.tokens).expand(count.shape)
            support[of_heads, low:high] = count.cpu().numpy()
            # An exact 0 where all are kept: nothing is added to 0.
            rest[of_heads, low:high] = rows.masked_fill(kept, 0).sum(-1).cpu().numpy()
            head, row, column = (part.cpu().numpy() for part in kept.nonzero(as_tuple=True))
            found.append((head + of_heads.start, row + low, column + tile.keys.start, rows[kept].cpu().numpy()))
        if softmax:
            # It gives weight to every key it sees, also where a float rounds it to 0.
            largest = np.where(_seen_blocks(blocks, self.block, window), np.maximum(largest, SMALLEST), largest)
        head, row, column, weight = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((column, row, head))
        kept = np.bincount(head * len(self.queries) + row, minlength=shape[0] * shape[1]).reshape(shape)
        return LayerWeights(
            number, window, support, kept.astype(np.int32), rest, column[order].astype(np.int32),
            np.maximum(weight[order].astype(np.float32), SMALLEST), largest,
        )  # fmt: skip


def _window(structure: dict, tokens: int) -> int | None:
    """The sliding window of a plain prompt's attention."""
    if structure.get("mask") is not None:
        raise ValueError("the attention of this model is more than causal with a window; it cannot be drawn yet")
    visible = structure.get("visible")
    if visible is None:
        return None
    start, end = visible[0].cpu().unbind(-1)
    own = torch.arange(1, tokens + 1)
    window = int((end - start).max())
    if not torch.equal(end, own.to(end)) or not torch.equal(start, (own - window).clamp(min=0).to(start)):
        raise ValueError("the attention of this model is more than causal with a window; it cannot be drawn yet")
    return None if window >= tokens else window


def _seen_blocks(blocks: int, block: int, window: int | None) -> np.ndarray:
    """(blocks, blocks): whether a query of the row's block sees a key of the column's."""
    row, column = np.indices((blocks, blocks))
    return (column <= row) & ((column + 1) * block - 1 > row * block - (window or np.inf))


def _block_maxima(weights: torch.Tensor, block: int) -> np.ndarray:
    """(heads, queries, keys) -> the largest weight of every block x block square."""
    queries, keys = weights.shape[-2:]
    padded = torch.nn.functional.pad(weights, (0, -keys % block, 0, -queries % block))
    largest = padded.unflatten(-1, (-1, block)).amax(-1).unflatten(-2, (-1, block)).amax(-2)
    # What is not 0 in float64 is not 0 here.
    return torch.where(largest > 0, largest.float().clamp(min=float(SMALLEST)), 0.0).cpu().numpy()


def _heaviest(rows: torch.Tensor, carries: torch.Tensor, count: torch.Tensor, most: int | None) -> torch.Tensor:
    """Which weights are kept: all that are not 0, or the heaviest of a query that has more than `most`."""
    if most is None or int(count.max()) <= most:
        return carries
    top = torch.zeros_like(carries).scatter_(-1, rows.topk(most).indices, True)
    return carries & top
