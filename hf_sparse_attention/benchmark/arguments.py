"""What is timed, and where the results go: the options of `benchmark`, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from .inputs import BLOCK, DTYPES
from .peers import PEERS


@dataclass
class BenchmarkArguments:
    """What is timed, and where the results go."""

    decode: bool = field(
        default=False, metadata={"help": "time decoding instead: one query against a cache, and whole generation"}
    )
    cache_lengths: list[int] = field(
        default_factory=lambda: [32768, 131072], metadata={"help": "with --decode: cached tokens, multiples of 64"}
    )
    batches: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "with --decode: sequences"})
    new_tokens: int = field(
        default=128, metadata={"help": "with --decode: tokens that a 1 B model generates on each cache; 0 for none"}
    )
    lengths: list[int] = field(default_factory=lambda: [8192, 32768], metadata={"help": "tokens, multiples of 64"})
    noise: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.6, 0.9],
        metadata={"help": "share of noise in queries and keys, 0 to 1: more noise, fewer empty blocks"},
    )
    peers: list[str] = field(
        default_factory=lambda: list(PEERS), metadata={"help": "what is timed beside the kernels; all by default"}
    )
    alpha: float = field(default=1.5, metadata={"help": "of the kernels, in (1, 4]"})
    batch: int = field(default=1, metadata={"help": "sequences"})
    heads: int = field(default=32, metadata={"help": "query heads"})
    kv_heads: int = field(default=8, metadata={"help": "key and value heads"})
    head_dim: int = field(default=128, metadata={"help": "dimension of a head"})
    dtype: str = field(default="bfloat16", metadata={"help": f"one of {', '.join(DTYPES)}"})
    repeats: int = field(default=10, metadata={"help": "timed calls, of which the median counts"})
    seed: int = field(default=0, metadata={"help": "of the inputs"})
    tune: bool = field(
        default=False,
        metadata={
            "help": "instead, try launch parameters for this card, head_dim and dtype on these lengths and noises, "
            "and write the best to configurations.json"
        },
    )
    changes: list[str] = field(
        default_factory=list,
        metadata={"help": "fields of the kernels' configuration to time as well, like stray_limit=64,split=true"},
    )
    kernel_times: bool = field(default=False, metadata={"help": "also print the time of each of our kernels"})
    output_dir: str = field(default="benchmark", metadata={"help": "folder for results.json and results.png"})


def check_arguments(arguments: BenchmarkArguments) -> None:
    if arguments.dtype not in DTYPES:
        raise ValueError(f"dtype is {arguments.dtype!r}; choose one of {', '.join(DTYPES)}")
    unknown = [name for name in arguments.peers if name not in PEERS]
    if unknown:
        raise ValueError(f"peers has {', '.join(map(repr, unknown))}; choose from {', '.join(PEERS)}")
    for name in ("lengths", "cache_lengths"):
        for length in getattr(arguments, name):
            if length < BLOCK or length % BLOCK:
                raise ValueError(f"{name} has {length}; a length is a positive multiple of {BLOCK}")
    if min(arguments.batches) < 1 or arguments.new_tokens < 0:
        raise ValueError(f"batches is {arguments.batches}, new_tokens {arguments.new_tokens}: they are not negative")
    for other in ("decode", "tune"):
        if getattr(arguments, other) and (arguments.changes or arguments.kernel_times):
            raise ValueError(f"changes and kernel_times do not go with {other}: they time training calls side by side")
    for change in arguments.changes:
        fields_of(change)
    for noise in arguments.noise:
        if not 0 <= noise <= 1:
            raise ValueError(f"noise has {noise}; it is a share between 0 and 1")
    if arguments.heads % arguments.kv_heads:
        raise ValueError(f"heads is {arguments.heads}, not a multiple of kv_heads, {arguments.kv_heads}")


def fields_of(change: str) -> dict[str, int | bool]:
    """stray_limit=64,split=true -> names and values."""
    try:
        parts = [part.split("=") for part in change.split(",")]
        return {name: value == "true" if value in ("true", "false") else int(value) for name, value in parts}
    except ValueError:
        raise ValueError(f"changes has {change!r}; write it like stray_limit=64,split=true") from None
