"""Padding, packed documents, windows and caches -> the range of keys each query may see.

A range is an integer tensor (batch or 1, queries, 2): query i sees the keys start <= j < end, none if start >= end.
Of a padding mask (batch, keys) what its rows look like, which a device is not asked of while `generate` appends to it.
"""

from enum import IntEnum

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def visible_range(
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    causal: bool = True,
    query_offset: int | torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
    last_key: torch.Tensor | None = None,
    document_starts: torch.Tensor | None = None,
    window: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The half-open key ranges, int32 (batch, queries, 2), of the structures given.

    Causal, query i stands at key query_offset + i and sees the keys up to its own; the default offset keys - queries
    aligns the last query with the last key:

        queries 2, keys 5      x x x x .        first_key=1, window=3      . x x x .
                               x x x x x                                   . . x x x

    first_key: (batch,) first key that is not padding. last_key: (batch,) one past the last such key.
    document_starts: (batch or 1, queries) the key at which each query's document starts.
    window: number of keys a query sees at most, its own included.
    query_offset: int, or one per batch row (batch,).
    """
    if queries < 0 or keys < 0 or batch < 1:
        raise ValueError(f"queries={queries}, keys={keys}, batch={batch}: lengths are >= 0 and batch >= 1")
    if not causal:
        for name, given in (("query_offset", query_offset), ("document_starts", document_starts), ("window", window)):
            if given is not None:
                raise ValueError(f"{name} needs causal=True; without it use first_key and last_key, or a mask")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a window holds at least the query's own key, so it is >= 1")
    if device is None:
        given = (first_key, last_key, document_starts, query_offset)
        device = next((tensor.device for tensor in given if isinstance(tensor, torch.Tensor)), None)

    start = torch.zeros(batch, queries, dtype=torch.int64, device=device)
    end = torch.full((batch, queries), keys, dtype=torch.int64, device=device)
    if causal:
        offset = keys - queries if query_offset is None else query_offset
        position = torch.arange(queries, device=device) + _per_row(offset, "query_offset", batch, device)
        end = torch.minimum(end, position + 1)
        if window is not None:
            start = torch.maximum(start, position + 1 - window)
    if first_key is not None:
        start = torch.maximum(start, _per_row(first_key, "first_key", batch, device))
    if last_key is not None:
        end = torch.minimum(end, _per_row(last_key, "last_key", batch, device))
    if document_starts is not None:
        if document_starts.shape not in ((batch, queries), (1, queries)):
            raise ValueError(
                f"document_starts has shape {tuple(document_starts.shape)}, not (batch or 1, queries) = "
                f"({batch} or 1, {queries})"
            )
        start = torch.maximum(start, document_starts.to(device))
    return torch.stack((start, end), dim=-1).clamp_(0, keys).to(torch.int32)


def _per_row(value, name: str, batch: int, device) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.full((1, 1), value, dtype=torch.int64, device=device)
    if value.dim() > 1 or value.numel() not in (1, batch):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not (batch,) = ({batch},)")
    if value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {value.dtype}; key positions are integers")
    return value.to(device).view(-1, 1)


class Padding(IntEnum):
    """Of the rows of a mask the one with least structure."""

    NONE = 0
    # All that is seen comes after all that is not.
    LEFT = 1
    # What is seen has no holes.
    RANGES = 2
    ANY = 3


# Mask that was made here -> its version, which counts what is written to it, and what its rows look like. Nobody else
# knows these masks; of one that a caller has nothing is remembered, as it may be written in ways that do not count.
_made = WeakTensorKeyDictionary()


def padding_of(mask: torch.Tensor) -> Padding:
    """What the rows of a mask (B, K) look like; waits for its device unless the mask was made here."""
    version, padding = _made.get(mask, (None, None))
    if padding is not None and version == mask._version:
        return padding
    seen, keys = mask != 0, mask.shape[1]
    count = seen.sum(-1)
    first = seen.int().argmax(-1)
    last = keys - seen.flip(-1).int().argmax(-1)
    whole, some = count == keys, count > 0
    ranges = ~some | (last - first == count)
    left = ranges & (~some | (last == keys))
    # One number, for which is waited once.
    return Padding(int(torch.stack([whole.all(), left.all(), ranges.all()]).logical_not().int().cumprod(0).sum()))


def with_new_tokens(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mask (B, K) of a prompt or of earlier steps -> (B, K + tokens), in which new tokens are seen."""
    padding = padding_of(mask)
    if tokens and padding == Padding.RANGES:
        # Some row had padding after its last token.
        padding = Padding.ANY
    return _remember(torch.cat([mask, mask.new_ones((mask.shape[0], tokens))], -1), padding)


def as_bool(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The mask in the dtype and on the device in which Transformers looks at it; what is known of it stays known."""
    version, padding = _made.get(mask, (None, None))
    converted = mask.to(device=device, dtype=torch.bool)
    if padding is None or version != mask._version or converted is mask:
        return converted
    return _remember(converted, padding)


def _remember(mask: torch.Tensor, padding: Padding) -> torch.Tensor:
    if mask.is_inference():
        # Writes to tensors of inference mode are not counted.
        with torch.inference_mode(False):
            mask = mask.clone()
    _made[mask] = (mask._version, padding)
    return mask
