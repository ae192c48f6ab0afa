"""Attention, decoding and whole training steps timed on this machine's own card: `hf-sparse-attention benchmark`."""

from .arguments import BenchmarkArguments
from .command import benchmark_attention

__all__ = ["BenchmarkArguments", "benchmark_attention"]
