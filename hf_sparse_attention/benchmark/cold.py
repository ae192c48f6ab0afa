"""How long the first call takes: in a new process with no kernel on disk, and when only the length is another one.

Each process is a fresh one with a cache folder of its own for Triton. Leaves a table and cold.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial

import torch

from ..visible import visible_range
from .inputs import DTYPES
from .ours import attend, difference, outputs
from .rows import table, write_rows
from .timing import seconds

PROGRAM = "from hf_sparse_attention.benchmark.cold import run_child; run_child()"
EMPTY, ON_DISK = "new process, empty cache", "new process, kernels on disk"


def time_first_calls(arguments, *, device: str = "cuda") -> list[dict]:
    """One row per process, mask and length: seconds of the first forward and backward, and of the second.

    Raises:
        RuntimeError: if a process ends with an error.
    """
    names = ("lengths", "alpha", "batch", "heads", "kv_heads", "head_dim", "dtype", "seed")
    asked = json.dumps({name: getattr(arguments, name) for name in names} | {"device": device})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for process in (EMPTY, ON_DISK):
            ended = subprocess.run(
                [sys.executable, "-c", PROGRAM, asked],
                env={**os.environ, "TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
            )
            if ended.returncode:
                raise RuntimeError(f"{process}: {ended.stderr.strip() or ended.returncode}")
            rows += [{"process": process, **row} for row in json.loads(ended.stdout.splitlines()[-1])]
    write_rows(arguments, device, "cold.json", rows=rows)
    print(table(rows, COLUMNS))
    return rows


def run_child() -> None:
    """What a process of its own does: its last argument says what is asked, its last line of output is the answer."""
    print(json.dumps(first_calls(**json.loads(sys.argv[-1]))))


def first_calls(*, lengths, alpha, batch, heads, kv_heads, head_dim, dtype, seed, device) -> list[dict]:
    """Causal attention at every length, then documents at every length; the first call of each and the second."""
    _begin(device)
    torch.manual_seed(seed)
    rows = []
    for mask in ("causal", "documents"):
        for number, length in enumerate(lengths):
            tensors = [
                torch.randn(batch, count, length, head_dim, device=device).to(DTYPES[dtype])
                for count in (heads, kv_heads, kv_heads, heads)
            ]
            visible = None
            if mask == "documents":
                starts = torch.arange(length, device=device) // 100 * 100
                visible = visible_range(length, length, document_starts=starts[None], device=device)
            found = []
            call = partial(_keep, found, partial(attend, alpha=alpha, visible=visible), tensors)
            row = {"mask": mask, "length": length}
            row["new"] = ("mask" if rows else "everything") if number == 0 else "length"
            row["first_s"], row["second_s"] = seconds(call, device), seconds(call, device)
            difference(found[0], found[1])
            rows.append(row)
    return rows


def _begin(device: str) -> None:
    """What any program on a GPU pays for and what is not the kernels': a context, a product, a backward."""
    matrix = torch.randn(256, 256, device=device, requires_grad=True)
    (matrix @ matrix).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def _keep(found: list, attention, tensors) -> None:
    *inputs, gradient = tensors
    found.append(outputs(attention, inputs, gradient))


COLUMNS = (
    ("process", "", "{}"),
    ("mask", "mask", "{}"),
    ("length", "length", "{:d}"),
    ("new", "new is", "{}"),
    ("first_s", "first call s", "{:.3f}"),
    ("second_s", "second call s", "{:.4f}"),
)
