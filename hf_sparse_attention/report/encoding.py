"""The attention over a prompt -> what the page's script reads: per layer one compressed stream of bytes."""

from __future__ import annotations

import base64
import zlib

import numpy as np

from .prompt import LayerWeights, PromptAttention

# A weight is a byte: 0 is exactly 0, b in 1 to 255 stands for 2^((b - 255) / STEPS); what is smaller is also 1.
STEPS = 16
# What rounding to a step can change a weight by, as a share of it, and the smallest weight that is told apart.
PRECISION = 2 ** (0.5 / STEPS) - 1
SMALLEST = 2.0 ** (-254 / STEPS)


def weight_codes(weights: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1 -> uint8; exactly 0 and nothing else becomes 0."""
    with np.errstate(divide="ignore"):
        codes = 255 + np.round(STEPS * np.log2(np.asarray(weights, np.float64)))
    return np.where(np.asarray(weights) > 0, np.clip(codes, 1, 255), 0).astype(np.uint8)


def weights_of_codes(codes: np.ndarray) -> np.ndarray:
    """What the page shows for a byte."""
    return np.where(codes > 0, np.exp2((codes.astype(np.float64) - 255) / STEPS), 0.0)


def varints(numbers: np.ndarray) -> bytes:
    """Whole numbers below 2^28 as groups of 7 bits, lowest first, the high bit set on all but the last (LEB128)."""
    numbers = np.asarray(numbers, np.int64)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < 2**28:
        raise ValueError(f"numbers from {numbers.min()} to {numbers.max()} do not fit into 28 bits")
    lengths = 1 + (numbers >= 2**7) + (numbers >= 2**14) + (numbers >= 2**21)
    ends = np.cumsum(lengths)
    stream = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for group in range(4):
        has = lengths > group
        more = lengths[has] > group + 1
        stream[(ends - lengths)[has] + group] = ((numbers[has] >> (7 * group)) & 127) | (more << 7)
    return stream.tobytes()


def layer_stream(layer: LayerWeights, queries: np.ndarray) -> bytes:
    """Before compression: varints (support, kept, then per query the steps back from its own key), a byte for the rest
    of every query, a byte per weight, and the coarse picture's lower triangle, a byte per block, in steps of 2.

    All by head, then query, then key from the nearest to the farthest.
    """
    sizes = layer.kept.ravel()
    row = np.repeat(np.arange(len(sizes)), sizes)
    # Nearest key first: then most steps are small.
    order = np.lexsort((-layer.keys, row))
    keys, weights = layer.keys[order], layer.weights[order]
    own = np.broadcast_to(queries, layer.kept.shape).ravel()[row]
    starts = np.cumsum(sizes) - sizes
    before = np.concatenate([own[:1], keys[:-1]])
    before[starts[sizes > 0]] = own[starts[sizes > 0]]
    numbers = np.concatenate([layer.support.ravel(), sizes, before - keys])
    below, left = np.tril_indices(layer.largest.shape[-1])
    coarse = -(-weight_codes(layer.largest[:, below, left]).astype(np.int64) // STEPS)
    codes = weight_codes(layer.rest), weight_codes(weights), coarse.astype(np.uint8)
    return varints(numbers) + b"".join(part.tobytes() for part in codes)


def encoded(prompt: PromptAttention) -> dict:
    """What the page holds of a prompt's attention, ready for JSON."""
    return {
        "queries": prompt.queries.tolist(),
        "block": prompt.block,
        "steps": STEPS,
        "layers": [
            {
                "layer": layer.layer,
                "window": layer.window,
                "heads": len(layer.kept),
                "entries": len(layer.keys),
                "stream": base64.b64encode(zlib.compress(layer_stream(layer, prompt.queries), 6)).decode(),
            }
            for layer in prompt.layers
        ],
    }
