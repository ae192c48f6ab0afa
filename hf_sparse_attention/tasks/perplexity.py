"""A causal language model and windows of text -> its loss per token, by length and by position in the window.

Loss is -log p(token | the window's tokens before it) in nats; perplexity is exp(mean loss).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .windows import Windows

# Logits held at once: 2^24 of them are 64 MiB in float32.
LOGITS = {"cpu": 2**24, "other": 2**27}


def position_edges(length: int) -> list[int]:
    """Edges of the buckets of positions: [1, 2), [2, 3), [3, 4), [4, 6), [6, 8), [8, 11), ..., two an octave.

    A position is the number of tokens before the predicted one, from 1 to length - 1.
    """
    edges, half_octaves = [1], 1
    while edges[-1] < length:
        edge = round(2 ** (half_octaves / 2))
        half_octaves += 1
        if edge > edges[-1]:
            edges.append(min(edge, length))
    return edges


@torch.inference_mode()
def token_losses(model: nn.Module, tokens: torch.Tensor, *, logits_at_once: int | None = None) -> torch.Tensor:
    """Losses, float32 (batch, length - 1) on the CPU, of tokens (batch, length); logits are made in pieces.

    Args:
        logits_at_once: most logits (batch x positions x vocabulary) held at a time; at least one position is.
    """
    batch, length = tokens.shape
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    if logits_at_once is None:
        logits_at_once = LOGITS.get(device.type, LOGITS["other"])
    step = max(1, logits_at_once // (batch * model.config.get_text_config().vocab_size))
    losses = torch.empty(batch, length - 1)
    for first, logits in _logits(model, tokens[:, :-1], step):
        wanted = tokens[:, first + 1 : first + 1 + logits.shape[1]]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")
        losses[:, first : first + logits.shape[1]] = loss.view_as(wanted)
    return losses


def _logits(model: nn.Module, tokens: torch.Tensor, step: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first position, logits (batch, positions, vocabulary)) piece by piece."""
    inner = model.base_model
    if inner is model:
        yield 0, model(input_ids=tokens, use_cache=False).logits
        return
    outputs = inner(input_ids=tokens, use_cache=False)
    hidden = outputs.last_hidden_state
    for first in range(0, tokens.shape[1], step):
        piece = copy.copy(outputs)
        piece.last_hidden_state = hidden[:, first : first + step]
        # The causal LM's own forward, as families scale or cap their logits after the head.
        with _answers(inner, piece):
            yield first, model(input_ids=tokens[:, first : first + step], use_cache=False).logits


@contextmanager
def _answers(module: nn.Module, outputs) -> Iterator[None]:
    """Calls of the module return `outputs`."""
    module.forward = lambda *args, **kwargs: outputs
    try:
        yield
    finally:
        del module.forward


def score(
    model: nn.Module, windows: Windows, *, batch_tokens: int, progress: Callable[[int], object] = lambda count: None
) -> dict:
    """Mean losses over the windows, each with its standard error (over windows; None for a single one).

    Returns:
        loss, perplexity, last_quarter (loss over the last quarter of the positions), bits_per_byte (None if unknown),
        positions (start, end, loss, standard_error of each bucket), or {"missing": reason} if a loss is not finite.

    Raises:
        torch.OutOfMemoryError: if a single window does not fit; batches are halved before.
    """
    length = windows.tokens.shape[1]
    given = windows.given
    edges = [given, *(edge for edge in position_edges(length) if edge > given)]
    quarter = length - given - max(1, (length - given) // 4)
    per_window, per_quarter, per_bucket = [], [], []
    for _, losses in _batches(model, windows, batch_tokens, progress):
        losses = losses[:, given - 1 :]
        per_window.append(losses.mean(1))
        per_quarter.append(losses[:, quarter:].mean(1))
        ranges = zip(edges, edges[1:], strict=False)
        per_bucket.append(torch.stack([losses[:, start - given : end - given].mean(1) for start, end in ranges], 1))
    per_window, per_quarter, per_bucket = torch.cat(per_window), torch.cat(per_quarter), torch.cat(per_bucket)
    bad = int((~per_window.isfinite()).sum())
    if bad:
        return {"missing": f"the loss is not finite (NaN or infinity) in {bad} of {len(windows)} windows"}
    loss, error = _mean(per_window)
    quarter_loss, quarter_error = _mean(per_quarter)
    size = None if windows.bytes is None else int(windows.bytes.sum())
    return {
        "loss": loss,
        "standard_error": error,
        "perplexity": _exp(loss),
        "last_quarter": quarter_loss,
        "last_quarter_standard_error": quarter_error,
        "bits_per_byte": float(per_window.sum()) * (length - given) / math.log(2) / size if size else None,
        "positions": [
            {"start": start, "end": end, "loss": loss, "standard_error": error}
            for start, end, (loss, error) in zip(edges, edges[1:], map(_mean, per_bucket.T), strict=False)
        ],
    }


def score_sliding(
    model: nn.Module, windows: Windows, *, batch_tokens: int, progress: Callable[[int], object] = lambda count: None
) -> dict:
    """Mean loss over the tokens that overlapping windows score (`Windows.first`), with its standard error.

    The error is that of a ratio of sums over windows; None for a single one.

    Returns:
        loss, standard_error, perplexity, or {"missing": reason} if a loss is not finite.

    Raises:
        torch.OutOfMemoryError: if a single window does not fit; batches are halved before.
    """
    length = windows.tokens.shape[1]
    sums, counts = [], length - windows.first.double()
    for rows, losses in _batches(model, windows, batch_tokens, progress):
        scored = torch.arange(1, length) >= windows.first[rows, None]
        # Not a product: the loss of a token that does not count may be anything.
        sums.append(torch.where(scored, losses, 0.0).sum(1))
    sums = torch.cat(sums)
    bad = int((~sums.isfinite()).sum())
    if bad:
        return {"missing": f"the loss is not finite (NaN or infinity) in {bad} of {len(windows)} windows"}
    loss = float(sums.sum() / counts.sum())
    error = None
    if len(windows) > 1:
        spread = (sums - loss * counts).square().sum() * len(windows) / (len(windows) - 1)
        error = float(spread.sqrt() / counts.sum())
    return {"loss": loss, "standard_error": error, "perplexity": _exp(loss)}


def _batches(
    model: nn.Module, windows: Windows, batch_tokens: int, progress: Callable[[int], object]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, losses (rows, length - 1) in float64) of all windows; batches are halved where one does not fit."""
    first, batch = 0, max(1, batch_tokens // windows.tokens.shape[1])
    while first < len(windows):
        rows = slice(first, first + batch)
        try:
            losses = token_losses(model, windows.tokens[rows]).double()
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            continue
        yield slice(first, first + len(losses)), losses
        first += len(losses)
        progress(len(losses))


def _mean(values: torch.Tensor) -> tuple[float, float | None]:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def _exp(loss: float) -> float | None:
    """None where the number is too large for a float."""
    return math.exp(loss) if loss < 700 else None
