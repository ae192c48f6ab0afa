"""`benchmark_attention`: options enter, what they ask for is timed."""

from __future__ import annotations

from pathlib import Path

import torch

from .arguments import BenchmarkArguments, check_arguments
from .attention import time_attention
from .decode import benchmark_decoding
from .inputs import block_inputs
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
    if arguments.decode:
        return benchmark_decoding(arguments)
    if arguments.tune:
        return _tune(arguments)
    return time_attention(arguments)


def _tune(arguments: BenchmarkArguments) -> list[dict]:
    from ..tune import tune_kernels

    inputs = [block_inputs(arguments, length, noise) for length in arguments.lengths for noise in arguments.noise]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return tune_kernels(
        inputs, folder / "configurations.json", alpha=arguments.alpha, median=median, repeats=arguments.repeats
    )
