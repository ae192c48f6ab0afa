"""Heads with ALiBi slopes beside heads without: what the hard reach that slopes give entmax saves.

Half of the heads have the slopes 1, 1/2, 1/3, ... of NAPE (arXiv 2506.16640), half have none; each half is timed
alone, and both in one call. Leaves a table and slopes.json.
"""

from __future__ import annotations

from functools import partial

import torch
from tqdm import tqdm

from .. import reference
from ..maps import alibi_slopes
from .inputs import DTYPES, block_inputs
from .ours import attend, difference, outputs, tolerance
from .peers import make_peers
from .rows import table, write_rows
from .timing import measure, measured

# Queries of one head, the last, that are compared with float64.
CHECKED_ROWS = 256
PLAIN, SLOPED, BOTH = "without slopes", "with slopes", "both (NAPE)"


def time_slopes(arguments, *, device: str = "cuda") -> list[dict]:
    """One row per length, noise and kind of head: milliseconds, and how many times faster than heads without slopes.

    Raises:
        RuntimeError: where the output is far from float64's.
    """
    rows = []
    cells = [(length, noise) for length in arguments.lengths for noise in arguments.noise]
    for length, noise in tqdm(cells, desc="slopes", unit="input"):
        group = _group(arguments, length, noise, device)
        for row in group:
            for kind in ("forward", "training"):
                if row.get(f"{kind}_ms"):
                    row[f"{kind}_times_faster"] = group[0][f"{kind}_ms"] / row[f"{kind}_ms"]
        rows += group
    write_rows(arguments, device, "slopes.json", rows=rows)
    print(table(rows, COLUMNS))
    return rows


def _group(arguments, length: int, noise: float, device: str) -> list[dict]:
    tensors = block_inputs(arguments, length, noise, device=device)
    slopes = alibi_slopes(arguments.heads, torch.device(device))
    first, second = ([tensor.chunk(2, 1)[part].contiguous() for tensor in tensors] for part in (0, 1))
    cases = {
        PLAIN: (first, partial(attend, alpha=arguments.alpha)),
        SLOPED: (second, partial(attend, alpha=arguments.alpha, slopes=slopes[arguments.heads // 2 :])),
        BOTH: (tensors, partial(attend, alpha=arguments.alpha, slopes=slopes)),
    }
    rows = []
    for name, (inputs, attention) in cases.items():
        row = {"length": length, "noise": noise, "heads_are": name, "heads": inputs[0].shape[1]}
        # What is wrong raises before it is timed.
        row["error"] = _error(arguments, inputs, attention)
        rows.append(row | measured(attention, inputs, arguments.repeats))
    if device == "cuda":
        for name, attention in make_peers(arguments, ["sdpa flash", "sdpa cudnn"]).items():
            row = {"length": length, "noise": noise, "heads_are": f"softmax, {name}", "heads": first[0].shape[1]}
            rows.append(row | measure(attention, first, arguments.repeats))
    return rows


def _error(arguments, tensors, attention) -> float:
    """How far the last queries of the last head, whose slope is the smallest, are from float64; and all is finite."""
    query, key, value = tensors
    found, *gradients = outputs(attention, tensors, torch.ones_like(query))
    slopes = attention.keywords.get("slopes")
    rows = (query[:1, -1:, -CHECKED_ROWS:].double(), key[:1, -1:].double(), value[:1, -1:].double())
    slopes = None if slopes is None else slopes[-1:].double()
    exact, _ = reference.attention(*rows, alpha=arguments.alpha, slopes=slopes)
    error = difference([found[:1, -1:, -CHECKED_ROWS:]], [exact])
    difference(gradients, gradients)
    if not error < tolerance(DTYPES[arguments.dtype]):
        raise RuntimeError(f"the attention is {error:.1e} away from float64: what is timed is wrong")
    return error


COLUMNS = (
    ("length", "length", "{:d}"),
    ("noise", "noise", "{:g}"),
    ("heads", "heads", "{:d}"),
    ("heads_are", "", "{}"),
    ("forward_ms", "forward ms", "{:.3f}"),
    ("forward_times_faster", "times faster", "{:.1f}"),
    ("training_ms", "training ms", "{:.3f}"),
    ("training_times_faster", "times faster", "{:.1f}"),
    ("training_peak_mib", "MiB", "{:.0f}"),
    ("error", "error", "{:.1e}"),
    ("refused", "", "{}"),
)
