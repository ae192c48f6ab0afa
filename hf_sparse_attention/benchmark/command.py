"""`benchmark_attention`: options enter, what they ask for is timed."""

from __future__ import annotations

from pathlib import Path

import torch

from .arguments import KINDS, BenchmarkArguments, check_arguments
from .attention import time_attention
from .cold import time_first_calls
from .decode import benchmark_decoding
from .grid import time_grid
from .inputs import block_inputs
from .model import time_model
from .packing import time_packing
from .slopes import time_slopes
from .timing import median


def benchmark_attention(arguments: BenchmarkArguments) -> list[dict]:
    """What the options ask for, measured: one row per line of the printed table.

    Raises:
        ValueError: for arguments that name nothing known.
        RuntimeError: without a CUDA or ROCm device.
    """
    check_arguments(arguments)
    if not torch.cuda.is_available():
        raise RuntimeError("the benchmark times GPU kernels and torch finds no CUDA or ROCm device")
    return _FUNCTIONS[arguments.what](arguments)


def _tune(arguments: BenchmarkArguments) -> list[dict]:
    from ..tune import tune_kernels

    inputs = [block_inputs(arguments, length, noise) for length in arguments.lengths for noise in arguments.noise]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return tune_kernels(
        inputs, folder / "configurations.json", alpha=arguments.alpha, median=median, repeats=arguments.repeats
    )


_FUNCTIONS = {
    "attention": time_attention,
    "decode": benchmark_decoding,
    "model": time_model,
    "packing": time_packing,
    "slopes": time_slopes,
    "grid": time_grid,
    "cold": time_first_calls,
    "tune": _tune,
}
if set(_FUNCTIONS) != set(KINDS):
    raise RuntimeError(f"what is timed and arguments.KINDS differ: {set(_FUNCTIONS) ^ set(KINDS)}")
