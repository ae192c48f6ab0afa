"""Documents packed into one sequence beside the same documents alone: what the ranges of visible keys cost.

Documents of one length alone are one batched call; of several lengths one call each, replayed from a CUDA graph, so
that in neither case launches count. Leaves a table and packing.json.
"""

from __future__ import annotations

import random
from functools import partial

import torch
from tqdm import tqdm

from ..visible import visible_range
from .inputs import BLOCK, DTYPES, block_inputs
from .ours import attend, difference, outputs, tolerance
from .rows import table, write_rows
from .timing import calls, medians, replay


def document_lengths(tokens: int, documents: int, *, equal: bool, seed: int) -> list[int]:
    """Equal lengths, which leave less than one token per document over, or the pieces between random cuts."""
    if equal:
        return [tokens // documents] * documents
    cuts = sorted(random.Random(seed).sample(range(1, tokens), documents - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)]


def time_packing(arguments, *, device: str = "cuda") -> list[dict]:
    """One row per length, noise and kind of document: milliseconds packed and alone, their ratio, how far they differ.

    Raises:
        RuntimeError: where packed documents do not give what they give alone.
    """
    cells = [
        (length, noise, equal) for length in arguments.lengths for equal in (True, False) for noise in arguments.noise
    ]
    rows = []
    for length, noise, equal in tqdm(cells, desc="packing", unit="input"):
        lengths = document_lengths(length, arguments.documents, equal=equal, seed=arguments.seed)
        rows.append({"length": length, "noise": noise, **_row(arguments, lengths, noise, device)})
    write_rows(arguments, device, "packing.json", rows=rows)
    print(table(rows, COLUMNS))
    return rows


def _row(arguments, lengths: list[int], noise: float, device: str) -> dict:
    parts = [
        [
            tensor[:, :, :count]
            for tensor in block_inputs(
                arguments, -(-count // BLOCK) * BLOCK, noise, device=device, seed=arguments.seed + number
            )
        ]
        for number, count in enumerate(lengths)
    ]
    packed = [torch.cat(tensors, 2) for tensors in zip(*parts, strict=True)]
    gradient = torch.randn_like(packed[0])
    starts = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0)
    starts = starts.repeat_interleave(torch.tensor(lengths, device=device))
    visible = visible_range(len(starts), len(starts), document_starts=starts[None], device=device)
    together = partial(attend, alpha=arguments.alpha, visible=visible)
    alone = partial(attend, alpha=arguments.alpha)
    equal = len(set(lengths)) == 1
    if equal:
        # One batched call: documents beside each other in the batch.
        separate = [
            ([torch.cat(tensors) for tensors in zip(*parts, strict=True)], torch.cat(gradient.split(lengths, 2)))
        ]
    else:
        pieces = [piece.contiguous() for piece in gradient.split(lengths, 2)]
        separate = [
            ([tensor.contiguous() for tensor in part], piece) for part, piece in zip(parts, pieces, strict=True)
        ]

    found = outputs(together, packed, gradient)
    expected = []
    for tensors in zip(*(outputs(alone, *call) for call in separate), strict=True):
        # The documents of a batch go one after the other, as those of several calls.
        documents = [piece for tensor in tensors for piece in tensor.split(arguments.batch)]
        expected.append(torch.cat(documents, 2))
    error = difference(found, expected)
    if not error < tolerance(DTYPES[arguments.dtype]):
        raise RuntimeError(f"packed documents differ from the same documents alone by {error:.1e}: leakage or a bug")
    row = {"documents": _words(lengths), "error": error}
    for kind in ("forward", "training"):
        each = [calls(alone, *part)[kind] for part in separate]
        row["alone"] = "one batched call" if equal else f"{len(lengths)} calls in a graph"
        both = {
            "packed": calls(together, packed, gradient)[kind],
            "alone": each[0] if equal else replay(partial(_all, each), device),
        }
        for name, milliseconds in medians(both, arguments.repeats, device).items():
            row[f"{kind}_{name}_ms"] = milliseconds
        row[f"{kind}_ratio"] = row[f"{kind}_packed_ms"] / row[f"{kind}_alone_ms"]
    return row


def _words(lengths: list[int]) -> str:
    if len(set(lengths)) == 1:
        return f"{len(lengths)} x {lengths[0]}"
    return f"{len(lengths)} of {min(lengths)} to {max(lengths)}"


def _all(several) -> None:
    for call in several:
        call()


COLUMNS = (
    ("length", "length", "{:d}"),
    ("documents", "documents", "{}"),
    ("noise", "noise", "{:g}"),
    ("forward_packed_ms", "forward ms", "{:.3f}"),
    ("forward_alone_ms", "alone", "{:.3f}"),
    ("forward_ratio", "ratio", "{:.2f}"),
    ("training_packed_ms", "training ms", "{:.3f}"),
    ("training_alone_ms", "alone", "{:.3f}"),
    ("training_ratio", "ratio", "{:.2f}"),
    ("alone", "alone is", "{}"),
    ("error", "difference", "{:.1e}"),
)
