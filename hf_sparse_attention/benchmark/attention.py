"""This GPU -> time, error, sparsity and memory of the kernels beside softmax attention and other entmax kernels.

Leaves a table, results.json and results.png.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .. import reference
from .arguments import BenchmarkArguments, fields_of
from .inputs import BLOCK, block_inputs
from .ours import attend, attend_with_tau, difference, outputs, tolerance
from .peers import PEERS, make_peers
from .rows import table, write_rows
from .timing import calls, kernel_times, measure, measured, refusal

logger = logging.getLogger(__name__)

# Queries of one head that are compared with float64.
CHECKED_ROWS = 512


def time_attention(arguments: BenchmarkArguments, *, device: str = "cuda") -> list[dict]:
    """A row per length, noise and implementation: milliseconds, ratio to SDPA cuDNN, error, sparsity, support, MiB.

    Raises:
        RuntimeError: where the kernels as they are do not compute the inputs, or are far from float64.
    """
    from ..kernels.configurations import configured

    variants = {"ours": {}} | {f"ours, {change}": fields_of(change) for change in arguments.changes}
    for changed in variants.values():
        # Refuses what is no field before anything is timed.
        with configured(**changed):
            pass
    rows, cells = [], [(length, noise) for length in arguments.lengths for noise in arguments.noise]
    progress = tqdm(cells, desc="benchmark", unit="input")
    softmax: dict[tuple[str, int], dict] = {}
    peers = make_peers(arguments)
    absent = [name for name in arguments.peers if name not in peers]
    if absent:
        logger.warning("not installed, so not timed: %s", ", ".join(absent))
    for length, noise in progress:
        tensors = block_inputs(arguments, length, noise, device=device)
        ours, sparsity, support = _describe(arguments, tensors)
        implementations = dict.fromkeys(variants, partial(attend, alpha=arguments.alpha)) | peers
        group = []
        for name, attention in implementations.items():
            progress.set_postfix_str(f"{length} tokens, noise {noise}, {name}")
            # The time of softmax does not depend on the noise.
            if name in PEERS and PEERS[name].softmax and (name, length) in softmax:
                row = dict(softmax[name, length])
            else:
                with configured(**variants.get(name, {})):
                    row = (measured if name == "ours" else measure)(attention, tensors, arguments.repeats)
                    if name in variants and "refused" not in row:
                        try:
                            row |= ours if name == "ours" else _describe(arguments, tensors)[0]
                        except RuntimeError as wrong:
                            row = {"refused": str(wrong)}
                    if name in PEERS and "refused" not in row:
                        found = _peer_errors(attention, tensors, 1.0 if PEERS[name].softmax else arguments.alpha)
                        row = found if "refused" in found else row | found
                    if name in variants and "refused" not in row and arguments.kernel_times:
                        row["kernels_ms"] = kernel_times(calls(attention, tensors)["training"])
                if name in PEERS and PEERS[name].softmax:
                    softmax[name, length] = row
            row = {"implementation": name, "length": length, "noise": noise, **row}
            row |= {"block_sparsity": sparsity, "support": support}
            group.append(row)
        base = next((row for row in group if row["implementation"] == "sdpa cudnn"), None)
        for row in group:
            for kind in ("forward", "training"):
                if base and base.get(f"{kind}_ms") and row.get(f"{kind}_ms"):
                    row[f"{kind}_ratio"] = row[f"{kind}_ms"] / base[f"{kind}_ms"]
        rows += group
        # Each time: a kernel of another project may leave a card that computes no more.
        folder = write_rows(arguments, device, "results.json", rows=rows)
    print(table(rows, COLUMNS))
    for row in rows:
        if "kernels_ms" in row:
            times = ", ".join(f"{name} {time:.3f}" for name, time in row["kernels_ms"].items())
            print(f"{row['length']}, noise {row['noise']}, {row['implementation']}: {times}")
    _picture(rows, folder / "results.png")
    return rows


def _errors(attention, tensors, alpha: float) -> dict[str, float]:
    """How far the last queries of two heads, and the gradients of what is made of them alone, are from the reference
    in float64; alpha 1 is softmax. Two heads, as a kernel may take another key head for the second.

    Raises:
        RuntimeError: where anything that is computed of these tensors is not finite.
    """
    query, key, value = tensors
    everything = outputs(attention, tensors, torch.ones_like(query))
    difference(everything, everything)
    heads = torch.arange(min(2, query.shape[1]), device=query.device)
    shared = heads * key.shape[1] // query.shape[1]

    def last(tensor):
        return tensor[:1, : len(heads), -CHECKED_ROWS:]

    gradient = torch.zeros_like(query)
    last(gradient).normal_()
    out, *gradients = outputs(attention, tensors, gradient)

    def exact(query, key, value):
        return reference.attention(query, key[:, shared], value[:, shared], alpha=alpha)[0]

    inputs = (last(query).double(), key[:1].double(), value[:1].double())
    wanted, *exact_gradients = outputs(exact, inputs, last(gradient).double())
    found = [last(gradients[0]), *(each[:1] for each in gradients[1:])]
    return {"error": difference([last(out)], [wanted]), "gradient_error": difference(found, exact_gradients)}


def _peer_errors(attention, tensors, alpha: float) -> dict:
    """What a peer computes is shown, right or wrong; what is not finite is no result."""
    try:
        return _errors(attention, tensors, alpha)
    except Exception as error:
        return {"refused": refusal(error)}


def _describe(arguments, tensors) -> tuple[dict[str, float], float, float]:
    """Errors against float64, share of empty blocks, keys with weight per query.

    Raises:
        RuntimeError: where the output is far from float64, or anything is not finite.
    """
    query, key, value = tensors
    _, tau = attend_with_tau(query, key, value, alpha=arguments.alpha)
    errors = _errors(lambda *inputs: attend_with_tau(*inputs, alpha=arguments.alpha)[0], tensors, arguments.alpha)
    if not errors["error"] < tolerance(query.dtype):
        raise RuntimeError(f"the attention is {errors['error']:.1e} away from float64: what is timed is wrong")
    # One group of heads stands for all: the blocks are drawn alike.
    group = query.shape[1] // key.shape[1]
    head = (query[:1, :group], key[:1, :1], tau[:1, :group])
    occupied = reference.block_occupancy(*head, block=BLOCK, alpha=arguments.alpha)
    blocks = occupied.shape[-1]
    sparsity = 1 - occupied.sum().item() / (group * blocks * (blocks + 1) / 2)
    return errors, sparsity, reference.support_size(*head, alpha=arguments.alpha).double().mean().item()


COLUMNS = (
    ("length", "length", "{:d}"),
    ("block_sparsity", "empty blocks", "{:.0%}"),
    ("support", "support", "{:.0f}"),
    ("implementation", "implementation", "{}"),
    ("forward_ms", "forward ms", "{:.3f}"),
    ("forward_ratio", "ratio", "{:.2f}"),
    ("training_ms", "training ms", "{:.3f}"),
    ("training_ratio", "ratio", "{:.2f}"),
    ("training_peak_mib", "MiB", "{:.0f}"),
    ("error", "error", "{:.1e}"),
    ("gradient_error", "of gradients", "{:.1e}"),
    ("refused", "", "{}"),
)


def _picture(rows: list[dict], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in rows})
    figure = Figure(figsize=(5 * len(lengths), 4), layout="constrained")
    for index, length in enumerate(lengths):
        axes = figure.add_subplot(1, len(lengths), index + 1, title=f"{length} tokens, forward + backward")
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = [
                (100 * row["block_sparsity"], row["training_ms"])
                for row in rows
                if row["length"] == length and row["implementation"] == name and row.get("training_ms")
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xlabel="empty blocks of 64 x 64, %", ylabel="ms", ylim=(0, None))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
