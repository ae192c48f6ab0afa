"""Small and ugly shapes, every mask: the kernels beside the PyTorch reference, forward and backward with launches.

The kernels are compiled first, by several processes. Leaves a table with the slowest shape of each variant, and
grid.json with all of them. What an interrupted run has measured stands in grid.partial.json: the next goes on there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .. import reference
from .inputs import DTYPES
from .ours import attend, difference
from .rows import table, unfinished_rows, write_rows
from .timing import medians, synchronize

logger = logging.getLogger(__name__)

MASKS = ("causal", "full", "left", "right", "packed", "window", "slopes", "slopes_window", "ragged", "boolean")
HEAD_DIMS = (8, 16, 32, 64, 80, 128, 256)
# "heads": one alpha per head, with a gradient.
ALPHAS = (1.5, 2.0, 1.333, "heads")
SHAPES = ((1, 1), (7, 7), (1, 130), (63, 65), (200, 111), (1000, 1000), (513, 2048), (4096, 4096))
HEADS, KEY_HEADS = 4, 2
# Processes that compile; each holds a context on the GPU, and compiles a set of about ten kernels side by side. So few
# that the first sets are done, and loaded by the process that times, while others are compiled.
MOST_PROCESSES = 32
CORES_PER_PROCESS = 4
PARTIAL = "grid.partial.json"


@dataclass(frozen=True)
class Variant:
    """What kernels are compiled for: everything but lengths, batch and number of heads."""

    mask: str
    dtype: str
    head_dim: int
    alpha: float | str


# Every mask twice, and with them every dtype, head dimension and alpha.
VARIANTS = tuple(
    Variant(MASKS[i % len(MASKS)], list(DTYPES)[i % 3], HEAD_DIMS[i % len(HEAD_DIMS)], ALPHAS[(i // 2) % len(ALPHAS)])
    for i in range(2 * len(MASKS))
)


def time_grid(
    arguments,
    *,
    device: str = "cuda",
    variants: tuple[Variant, ...] = VARIANTS,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    processes: int | None = None,
) -> list[dict]:
    """One row per variant and shape: milliseconds of ours and of the reference, their ratio.

    Args:
        processes: how many compile the kernels first; by default none where there is nothing to compile.

    Raises:
        RuntimeError: where ours gives something else than the reference, or values that are not finite.
    """
    started = time.perf_counter()
    if processes is None:
        most = min(MOST_PROCESSES, 2 * len(variants), max(1, _cores() // CORES_PER_PROCESS))
        processes = most if device == "cuda" else 0
    measured = _measured(variants, shapes)
    rows = _kept_rows(arguments, device, measured)
    left = [variant for variant in variants if not any(row["variant"] == vars(variant) for row in rows)]
    if processes and left:
        _compile_together(left, shapes, arguments.seed, device, processes)
    compiled = time.perf_counter() - started
    done = len(variants) - len(left)
    for variant in tqdm(left, desc="grid", unit="variant", initial=done, total=len(variants)):
        rows += [_row(arguments, variant, shape, device) for shape in shapes]
        write_rows(arguments, device, PARTIAL, unfinished=True, measured=measured, rows=rows)
    slowest = []
    for variant in variants:
        own = [row for row in rows if row["variant"] == vars(variant)]
        slowest.append(max(own, key=lambda row: row["ratio"]))
    counts = {"variants": len(variants), "compile_s": compiled, "processes": processes}
    folder = write_rows(arguments, device, "grid.json", **counts, rows=rows)
    (folder / PARTIAL).unlink(missing_ok=True)
    print(table([row | row["variant"] for row in slowest], COLUMNS))
    worst, slower = max(slowest, key=lambda row: row["ratio"]), sum(row["ratio"] > 1 for row in rows)
    print(
        f"{len(rows)} shapes, {len(variants)} variants of the kernels compiled in {compiled:.0f} s. "
        f"{slower} shapes are slower than the reference; the slowest takes {worst['ratio']:.2f} of its time"
    )
    return rows


def _measured(variants, shapes) -> dict:
    """What rows are of, besides arguments and card: an interrupted run of anything else is not gone on with."""
    package = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        package.update(file.read_bytes())
    measured = {"package": package.hexdigest(), "variants": [vars(one) for one in variants], "shapes": shapes}
    return json.loads(json.dumps(measured))


def _kept_rows(arguments, device: str, measured: dict) -> list[dict]:
    """The rows an interrupted run of the same left, or none."""
    left = unfinished_rows(arguments, device, PARTIAL)
    rows = left["rows"] if left.get("measured") == measured else []
    if rows:
        logger.warning("%d rows of an interrupted run are kept, this run goes on there", len(rows))
    elif (Path(arguments.output_dir) / PARTIAL).exists():
        logger.warning("%s is of an interrupted run of other arguments or code: this one begins anew", PARTIAL)
    return rows


def make_case(variant: Variant, queries: int, keys: int, *, seed: int, device: str) -> tuple[list, dict]:
    """query, key, value and the output's gradient; and the arguments of the attention."""
    draw = random.Random(f"{seed} {variant} {queries} {keys}")
    generator = torch.Generator(device).manual_seed(draw.randrange(2**31))
    tensors = [
        torch.randn(1, heads, length, variant.head_dim, generator=generator, device=device).to(DTYPES[variant.dtype])
        for heads, length in ((HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys), (HEADS, queries))
    ]
    arguments = {"alpha": variant.alpha}
    if variant.alpha == "heads":
        arguments["alpha"] = torch.tensor([1.2, 1.5, 1.7, 2.0], device=device)
    mask, position = variant.mask, torch.arange(queries, device=device) + keys - queries
    end = (position + 1).clamp(0, keys)
    start = torch.zeros_like(end)
    if mask == "full":
        arguments["causal"] = False
    elif mask == "left":
        start = start + draw.randrange(keys)
    elif mask == "right":
        end = end.clamp(max=draw.randint(1, keys))
    elif mask == "packed":
        start = position.clamp(min=0) // 100 * 100
    elif mask in ("window", "slopes_window"):
        start = (end - 100).clamp(min=0)
    elif mask == "ragged":
        start = torch.randint(0, keys, (queries,), generator=generator, device=device)
        end = (start + torch.randint(-2, keys, (queries,), generator=generator, device=device)).clamp(max=keys)
    elif mask == "boolean":
        arguments["mask"] = torch.rand(1, 1, queries, keys, generator=generator, device=device) < 0.5
    if mask in ("slopes", "slopes_window"):
        arguments["slopes"] = torch.tensor([0.0, 1.0, 0.5, 1 / 3], device=device)
    if mask in ("left", "right", "packed", "window", "slopes_window", "ragged"):
        arguments["visible"] = torch.stack([start, end], -1)[None].int()
    return tensors, arguments


def _row(arguments, variant: Variant, shape: tuple[int, int], device: str) -> dict:
    (*tensors, gradient), keywords = make_case(variant, *shape, seed=arguments.seed, device=device)
    ours, eager = partial(attend, **keywords), partial(_reference, **keywords)
    name = f"{variant.mask}, {variant.dtype}, head_dim {variant.head_dim}, alpha {variant.alpha}, {shape}"
    try:
        found = _training(ours, tensors, gradient)
        error = difference(found[:1], _training(eager, tensors, gradient)[:1])
        difference(found, found)
    except (RuntimeError, ValueError) as reason:
        raise RuntimeError(f"{name}: {reason}") from reason
    # Wide: how exact the kernels are is what the tests say. Here a wrong answer shall not be a fast one.
    if not error < max(16 * torch.finfo(DTYPES[variant.dtype]).eps, 1e-3):
        raise RuntimeError(f"{name}: the kernels are {error:.1e} away from the reference")
    row = {"variant": vars(variant), "queries": shape[0], "keys": shape[1], "error": error}
    both = {
        f"{kind}_ms": partial(_training, attention, tensors, gradient)
        for kind, attention in (("ours", ours), ("reference", eager))
    }
    # Thousands of rows one after the other: the card does not wait between them.
    row |= medians(both, arguments.repeats, device, clear=False, warm_up=0.0)
    return row | {"ratio": row["ours_ms"] / row["reference_ms"]}


def _reference(query, key, value, **keywords):
    return reference.attention(query, key, value, **keywords)[0]


def _training(attention: partial, tensors, gradient) -> list[torch.Tensor]:
    """The output and every gradient, that of alpha too where heads have their own."""
    leaves, keywords = [tensor.detach().requires_grad_() for tensor in tensors], dict(attention.keywords)
    wanted = list(leaves)
    if isinstance(keywords["alpha"], torch.Tensor):
        keywords["alpha"] = keywords["alpha"].detach().requires_grad_()
        wanted.append(keywords["alpha"])
    out = attention.func(*leaves, **keywords)
    return [out.detach(), *torch.autograd.grad(out, wanted, gradient)]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile_together(variants, shapes, seed: int, device: str, processes: int) -> None:
    """Every variant run once at every shape by several processes, whose kernels this one finds on disk."""
    # What takes longest begins first: wide rows of float32.
    longest = sorted(variants, key=lambda one: one.head_dim * DTYPES[one.dtype].itemsize, reverse=True)
    work = [(variant, some) for variant in longest for some in _apart(variant, shapes, device)]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            runs = [pool.submit(_run_all, variant, some, seed, device) for variant, some in work]
            sets = dict(zip(runs, work, strict=True))
            for run in tqdm(as_completed(runs), total=len(runs), desc="compile", unit="set of kernels"):
                run.result()
                # Loaded from disk, while the others compile: that took most of a variant's time.
                _run_all(*sets[run], seed, device)
    except BrokenProcessPool:
        logger.warning("a process that compiles kernels ended early; they are compiled one after the other")


def _apart(variant: Variant, shapes, device: str) -> list[list[tuple[int, int]]]:
    """The shapes that one set of kernels serves and those that another does: those of few keys."""
    from ..kernels.configurations import configuration
    from ..kernels.operators import _block_dim
    from ..kernels.short import is_short

    row = configuration(torch.device(device), DTYPES[variant.dtype].itemsize, _block_dim(variant.head_dim))
    few = [shape for shape in shapes if is_short(row.short_keys, *shape)]
    return [some for some in ([shape for shape in shapes if shape not in few], few) if some]


def _run_all(variant: Variant, shapes, seed: int, device: str) -> None:
    for shape in shapes:
        (*tensors, gradient), keywords = make_case(variant, *shape, seed=seed, device=device)
        _training(partial(attend, **keywords), tensors, gradient)
    synchronize(device)


COLUMNS = (
    ("mask", "mask", "{}"),
    ("dtype", "dtype", "{}"),
    ("head_dim", "head_dim", "{:d}"),
    ("alpha", "alpha", "{}"),
    ("queries", "slowest at: queries", "{:d}"),
    ("keys", "keys", "{:d}"),
    ("ours_ms", "ours ms", "{:.3f}"),
    ("reference_ms", "reference ms", "{:.3f}"),
    ("ratio", "ratio", "{:.2f}"),
)
