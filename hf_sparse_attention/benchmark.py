"""This GPU -> time, error, sparsity and memory of the kernels beside softmax attention and other entmax kernels.

The inputs make block sparsity a dial: every block of 64 keys has a code, every block of queries aims at its own and
one earlier; the more noise, the fewer blocks are empty. Leaves a table, results.json and results.png.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from . import reference
from .benchmark_decode import benchmark_decoding
from .config import VERSION
from .files import write_json

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCK = 64
# Queries of one head that are compared with float64.
CHECKED_ROWS = 512


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


def benchmark_attention(arguments: BenchmarkArguments) -> list[dict]:
    """One row per length, noise and implementation: milliseconds, ratio to SDPA cuDNN, error, sparsity, support, MiB.

    Raises:
        ValueError: for arguments that name nothing known.
        RuntimeError: without a CUDA or ROCm device.
    """
    _check(arguments)
    if arguments.decode:
        return benchmark_decoding(arguments)
    if arguments.tune:
        return _tune(arguments)
    from .kernels.configurations import configured

    variants = {"ours": {}} | {f"ours, {change}": _fields(change) for change in arguments.changes}
    for changed in variants.values():
        # Refuses what is no field before anything is timed.
        with configured(**changed):
            pass
    rows, cells = [], [(length, noise) for length in arguments.lengths for noise in arguments.noise]
    progress = tqdm(cells, desc="benchmark", unit="input")
    softmax: dict[tuple[str, int], dict] = {}
    for length, noise in progress:
        tensors = block_inputs(arguments, length, noise)
        ours, sparsity, support = _describe(arguments, tensors)
        implementations = dict.fromkeys(variants, lambda q, k, v: _ours(arguments, q, k, v)) | _peers(arguments)
        group = []
        for name, attention in implementations.items():
            progress.set_postfix_str(f"{length} tokens, noise {noise}, {name}")
            # The time of softmax does not depend on the noise.
            if name in PEERS and PEERS[name].softmax and (name, length) in softmax:
                row = dict(softmax[name, length])
            else:
                with configured(**variants.get(name, {})):
                    row = _measure(attention, tensors, arguments.repeats)
                    if name in variants and "refused" not in row:
                        row["error"] = ours if name == "ours" else _describe(arguments, tensors)[0]
                        if arguments.kernel_times:
                            row["kernels_ms"] = _kernel_times(attention, tensors)
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
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    card = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "version": VERSION}
    write_json(folder / "results.json", {**card, "arguments": asdict(arguments), "rows": rows})
    print(_table(rows))
    for row in rows:
        if "kernels_ms" in row:
            times = ", ".join(f"{name} {time:.3f}" for name, time in row["kernels_ms"].items())
            print(f"{row['length']}, noise {row['noise']}, {row['implementation']}: {times}")
    _picture(rows, folder / "results.png")
    return rows


def _tune(arguments: BenchmarkArguments) -> list[dict]:
    from .tune import tune_kernels

    inputs = [block_inputs(arguments, length, noise) for length in arguments.lengths for noise in arguments.noise]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return tune_kernels(
        inputs, folder / "configurations.json", alpha=arguments.alpha, median=_median, repeats=arguments.repeats
    )


def block_inputs(arguments: BenchmarkArguments, length: int, noise: float) -> tuple[torch.Tensor, ...]:
    """query (B, H, N, D), key and value (B, G, N, D) on the GPU."""
    generator = torch.Generator("cuda").manual_seed(arguments.seed)
    blocks, dim = length // BLOCK, arguments.head_dim
    shape = (arguments.batch, arguments.kv_heads)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device="cuda")

    code = torch.nn.functional.normalize(normal(*shape, blocks, dim), dim=-1) * math.sqrt(dim)
    key = code.repeat_interleave(BLOCK, 2) * math.sqrt(1 - noise) + normal(*shape, length, dim) * math.sqrt(noise)
    code = code.repeat_interleave(arguments.heads // arguments.kv_heads, 1)
    choice = torch.rand(*code.shape[:3], generator=generator, device="cuda")
    earlier = (choice * torch.arange(blocks, device="cuda").clamp(min=1)).long()
    aim = (code + code.gather(2, earlier[..., None].expand_as(code))) / math.sqrt(2)
    query = aim.repeat_interleave(BLOCK, 2) * math.sqrt(1 - noise)
    query = (query + normal(*query.shape) * math.sqrt(noise)) * 2 / dim**0.25
    dtype = DTYPES[arguments.dtype]
    return query.to(dtype), key.to(dtype), normal(*shape, length, dim).to(dtype)


def _check(arguments: BenchmarkArguments) -> None:
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
        _fields(change)
    for noise in arguments.noise:
        if not 0 <= noise <= 1:
            raise ValueError(f"noise has {noise}; it is a share between 0 and 1")
    if arguments.heads % arguments.kv_heads:
        raise ValueError(f"heads is {arguments.heads}, not a multiple of kv_heads, {arguments.kv_heads}")
    if not torch.cuda.is_available():
        raise RuntimeError("the benchmark times GPU kernels and torch finds no CUDA or ROCm device")


def _ours(arguments, query, key, value):
    from .kernels import entmax_attention

    return entmax_attention(query, key, value, alpha=arguments.alpha)[0]


def _fields(change: str) -> dict:
    """stray_limit=64,split=true,forward=4:3 -> names and values; 4:3 stands for a `Launch` of 4 warps and 3 stages."""
    from .kernels.configurations import Launch

    def value_of(text):
        if text in ("true", "false"):
            return text == "true"
        return Launch(*(int(number) for number in text.split(":"))) if ":" in text else int(text)

    try:
        return {name: value_of(value) for name, value in (part.split("=") for part in change.split(","))}
    except (TypeError, ValueError):
        raise ValueError(f"changes has {change!r}; write it like stray_limit=64,split=true,forward=4:3") from None


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Args:
        make: arguments -> a function of query, key and value, or None where it is not installed.
        softmax: whether it computes softmax, so that its time says what sparsity must beat.
    """

    make: Callable
    softmax: bool


def _sdpa(backend: str):
    def make(arguments):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attention(query, key, value):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
                )

        return attention

    return make


def _flex(arguments):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), {}

    def attention(query, key, value):
        length = query.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
        return compiled(query, key, value, block_mask=masks[length], enable_gqa=query.shape[1] != key.shape[1])

    return attention


def _adasplash(arguments):
    if importlib.util.find_spec("adasplash") is None:
        return None
    import adasplash

    def attention(query, key, value):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return adasplash.adasplash(query, key, value, alpha=arguments.alpha, is_causal=True)

    return attention


PEERS = {
    "sdpa flash": Peer(_sdpa("FLASH_ATTENTION"), softmax=True),
    "sdpa cudnn": Peer(_sdpa("CUDNN_ATTENTION"), softmax=True),
    "flex attention": Peer(_flex, softmax=True),
    "adasplash": Peer(_adasplash, softmax=False),
}


def _peers(arguments) -> dict[str, Callable]:
    made = {name: PEERS[name].make(arguments) for name in arguments.peers}
    return {name: attention for name, attention in made.items() if attention is not None}


def _measure(attention, tensors, repeats: int) -> dict:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.randn_like(tensors[0])

    def forward():
        with torch.no_grad():
            attention(*tensors)

    def training():
        torch.autograd.grad(attention(*leaves), leaves, gradient)

    row = {}
    try:
        for kind, call in (("forward", forward), ("training", training)):
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            row[f"{kind}_first_call_s"] = time.perf_counter() - started
            row[f"{kind}_ms"] = _median(call, repeats)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            row[f"{kind}_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        row["refused"] = str(error).splitlines()[0][:200]
    return row


def _kernel_times(attention, tensors) -> dict[str, float]:
    """Milliseconds on the GPU by kernel, of one forward and backward; what takes less than 1 us is left out."""
    from torch.profiler import ProfilerActivity, profile

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.randn_like(tensors[0])
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        torch.autograd.grad(attention(*leaves), leaves, gradient)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / 1000 for event in recorded.key_averages()}
    return {name: time for name, time in sorted(times.items(), key=lambda item: -item[1]) if time >= 0.001}


def _median(call, repeats: int) -> float:
    # What is cleared between the calls is larger than the cache, and long enough for the host to stay ahead.
    clear = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        call()
    pairs = []
    for _ in range(repeats):
        clear.zero_()
        clear.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairs)
    return times[len(times) // 2]


def _describe(arguments, tensors) -> tuple[float, float, float]:
    """Relative error against float64 of the last rows of a head, share of empty blocks, keys with weight per query."""
    from .kernels import entmax_attention

    query, key, value = tensors
    out, tau = entmax_attention(query, key, value, alpha=arguments.alpha)
    last = (query[:1, :1, -CHECKED_ROWS:].double(), key[:1, :1].double(), value[:1, :1].double())
    exact, _ = reference.attention(*last, alpha=arguments.alpha)
    error = ((out[:1, :1, -CHECKED_ROWS:].double() - exact).norm() / exact.norm()).item()
    # One group of heads stands for all: the blocks are drawn alike.
    group = query.shape[1] // key.shape[1]
    head = (query[:1, :group], key[:1, :1], tau[:1, :group])
    occupied = reference.block_occupancy(*head, block=BLOCK, alpha=arguments.alpha)
    blocks = occupied.shape[-1]
    sparsity = 1 - occupied.sum().item() / (group * blocks * (blocks + 1) / 2)
    return error, sparsity, reference.support_size(*head, alpha=arguments.alpha).double().mean().item()


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
    ("refused", "", "{}"),
)


def _table(rows: list[dict]) -> str:
    text = [[title for _, title, _ in COLUMNS]]
    for row in rows:
        text.append([shape.format(row[name]) if row.get(name) is not None else "" for name, _, shape in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in text)


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
