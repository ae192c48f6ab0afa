"""This GPU -> time of one decoding step beside softmax, and tokens per second of a whole model.

Over cache length, batch and how peaked the scores are; steps are replayed from a CUDA graph. Leaves tables,
decode.json and decode.png.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, StaticCache

from .. import reference
from ..cache import BALL, STATE, BoundedDynamicCache, BoundedStaticCache, update_page_bounds
from ..tables import number, plain
from .generation import BOUNDED, ONE_BILLION, OURS, generation_table, time_generation
from .inputs import BLOCK
from .ours import difference, tolerance
from .rows import unfinished_rows, write_rows
from .timing import medians, refusal, replay

logger = logging.getLogger(__name__)

SOFTMAX = ("sdpa flash", "sdpa cudnn")
# What bounds cost where they do not help.
RESTING = "ours, bounds at rest"
STEPS = (OURS, BOUNDED, RESTING)


class _Record:
    """decode.json, written after every measurement; what a run that was cut short left there is not measured again."""

    def __init__(self, arguments, device: str):
        self._arguments, self._device = arguments, device
        left = unfinished_rows(arguments, device, "decode.json")
        self.rows, self.generation, self.memory = (left.get(name, []) for name in ("rows", "generation", "memory"))
        if left:
            logger.warning("goes on with %d rows of %s", len(self.rows + self.generation), arguments.output_dir)

    def write(self, **state) -> Path:
        rows = {"rows": self.rows, "generation": self.generation, "memory": self.memory}
        return write_rows(self._arguments, self._device, "decode.json", **rows, **state)


def benchmark_decoding(arguments, *, device: str = "cuda", timer: Callable | None = None, shape=None) -> list[dict]:
    """One row per cache length, batch, noise and implementation; per length one of generation with each cache, and
    one of the memory of each cache. Tables are printed as soon as they are known; a run that was cut short goes on.

    Raises:
        RuntimeError, ValueError: what the kernels say where they do not compute the inputs, or are far from float64.

    Args:
        arguments: a `BenchmarkArguments`.
        timer: calls by name -> their milliseconds, by default the medians of replays of their CUDA graphs.
        shape: fields of the LlamaConfig that generates, by default those of a model of 1 B parameters.
    """
    from ..kernels.decode import decoding

    timer = timer or partial(medians, repeats=arguments.repeats)
    record = _Record(arguments, device)
    with decoding(True):
        _time_steps(arguments, device, timer, record)
        print(step_table(record.rows))
        if len(arguments.cache_lengths) > 1:
            print(growth_table(record.rows))
        record.memory = [row for length in arguments.cache_lengths for row in memory_rows(arguments, length, device)]
        print(memory_table(record.memory), flush=True)
        _picture(record.rows, record.write(unfinished=True) / "decode.png")
        if arguments.new_tokens:
            time_generation(
                arguments, device, shape or ONE_BILLION, record.generation, partial(record.write, unfinished=True)
            )
            print(generation_table(record.generation))
    record.write()
    return record.rows + record.generation + record.memory


def _time_steps(arguments, device, timer, record: _Record) -> None:
    cells = [(length, batch) for length in arguments.cache_lengths for batch in arguments.batches]
    known = {(row["length"], row["batch"], row["noise"]) for row in record.rows}
    softmax = {
        (row["length"], row["batch"], row["implementation"]): {
            key: row[key] for key in ("ms", "refused") if key in row
        }
        for row in record.rows
        if row["implementation"] not in STEPS
    }
    with tqdm(total=len(cells) * len(arguments.noise), desc="decode", unit="input") as progress:
        for length, batch, noise in ((*cell, noise) for cell in cells for noise in arguments.noise):
            progress.set_postfix_str(f"{batch} x {length} tokens, noise {noise}")
            if (length, batch, noise) not in known:
                group = _step_rows(arguments, length, batch, noise, device, timer, softmax)
                times = [row["ms"] for row in group if row["implementation"] in SOFTMAX and row.get("ms")]
                for row in group:
                    row["ratio"] = row["ms"] / min(times) if times and row.get("ms") else None
                record.rows += group
                record.write(unfinished=True)
            progress.update()


def cache_inputs(arguments, length: int, batch: int, noise: float, device: str) -> tuple[torch.Tensor, ...]:
    """query (B, H, 1, D), key and value (B, G, K, D): the query aims at the last block of keys and an earlier one."""
    generator = torch.Generator(device).manual_seed(arguments.seed)
    dtype, dim = getattr(torch, arguments.dtype), arguments.head_dim
    shape = (batch, arguments.kv_heads)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device=device)

    code = torch.nn.functional.normalize(normal(*shape, length // BLOCK, dim), dim=-1) * math.sqrt(dim)
    key = torch.empty(*shape, length, dim, dtype=dtype, device=device)
    value = torch.empty_like(key)
    for index in range(batch):
        codes = code[index].repeat_interleave(BLOCK, 1) * math.sqrt(1 - noise)
        key[index] = codes + normal(*key.shape[1:]) * math.sqrt(noise)
        value[index] = normal(*value.shape[1:])
    heads = code.repeat_interleave(arguments.heads // arguments.kv_heads, 1)
    earlier = torch.rand(*heads.shape[:2], 1, 1, generator=generator, device=device) * (length // BLOCK - 1)
    aim = (heads[:, :, -1:] + heads.gather(2, earlier.long().expand(-1, -1, 1, dim))) / math.sqrt(2)
    query = (aim * math.sqrt(1 - noise) + normal(*aim.shape) * math.sqrt(noise)) * 2 / dim**0.25
    return query.to(dtype), key, value


def page_bounds_of(key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(lower, upper, codes, ball) of the pages of keys (B, G, K, D)."""
    lower, upper = (key.new_zeros((*key.shape[:2], key.shape[2] // BLOCK, key.shape[3])) for _ in range(2))
    codes, ball = torch.zeros_like(lower, dtype=torch.int8), lower.new_zeros((*lower.shape[:3], BALL)).float()
    update_page_bounds(key, lower, upper, codes, ball, None, 0, key.shape[2])
    return lower, upper, codes, ball


def _step_rows(arguments, length, batch, noise, device, timer, softmax) -> list[dict]:
    from ..kernels import entmax_attention
    from ..kernels.decode import share_of_pages_read

    query, key, value = cache_inputs(arguments, length, batch, noise, device)
    alpha = arguments.alpha
    # As a cache keeps them: where they do not help they rest. And at rest for longer than is timed.
    bounds, state = page_bounds_of(key), torch.zeros(STATE, dtype=torch.int32, device=device)
    pages, resting = (*bounds, state), (*bounds, torch.tensor([1 << 30, 0, 0], dtype=torch.int32, device=device))
    calls = {
        OURS: lambda: entmax_attention(query, key, value, alpha=alpha)[0],
        BOUNDED: lambda: entmax_attention(query, key, value, alpha=alpha, pages=pages)[0],
        RESTING: lambda: entmax_attention(query, key, value, alpha=alpha, pages=resting)[0],
        "sdpa flash": lambda: _sdpa("FLASH_ATTENTION", query, key, value),
        "sdpa cudnn": lambda: _sdpa("CUDNN_ATTENTION", query, key, value),
        "eager": lambda: _eager(query, key, value),
    }
    if device != "cuda":
        del calls["sdpa flash"], calls["sdpa cudnn"]
    common = {"length": length, "batch": batch, "noise": noise}
    bytes_of_keys = key.numel() * key.element_size()
    exact, tau = reference.attention(
        query[:1].double(), key[:1].double(), value[:1].double(), alpha=alpha, causal=True
    )
    group = query.shape[1] // key.shape[1]
    support = reference.support_size(query[:1, :group], key[:1, :1], tau[:1, :group].float(), alpha=alpha)
    # The time of softmax does not depend on the noise.
    timed = {name: call for name, call in calls.items() if name in STEPS or (length, batch, name) not in softmax}
    ready, refused = _ready(timed, device)
    times = timer(ready)
    for name in timed.keys() - set(STEPS):
        softmax[length, batch, name] = {"ms": times[name]} if name in ready else {"refused": refused[name]}
    rows = []
    for name, call in calls.items():
        row = {**common, "implementation": name}
        if name in STEPS:
            row["ms"] = times[name]
            row["error"] = difference([call()[:1]], [exact])
            if not row["error"] < tolerance(query.dtype):
                raise RuntimeError(f"{name}: the attention is {row['error']:.1e} away from float64")
            row["support"] = support.double().mean().item()
            row["milliseconds_of_kernels"] = _kernel_milliseconds(call) if device == "cuda" else {}
            if name == BOUNDED:
                row["pages_read"] = share_of_pages_read(query, key, pages, alpha=alpha)
        else:
            row |= softmax[length, batch, name]
        if row.get("ms"):
            row["keys_per_second_tb"] = bytes_of_keys / row["ms"] / 1e9
        rows.append(row)
    return rows


def _ready(calls: dict[str, Callable], device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """The calls as replays of their CUDA graphs, and why those that another's kernel does not compute are not there.

    What ours do not compute raises: it is a fault here, where another kernel may have its reasons, in errors of its
    own kind.
    """
    ready, refused = {}, {}
    for name, call in calls.items():
        try:
            call()
            ready[name] = replay(call, device)
        except Exception as error:
            if name in STEPS:
                raise
            refused[name] = refusal(error)
    return ready, refused


def _sdpa(backend, query, key, value):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        grouped = query.shape[1] != key.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)


def _eager(query, key, value):
    """As Transformers' eager attention: keys and values repeated for every query head."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


def _kernel_milliseconds(call: Callable) -> dict[str, float]:
    """Milliseconds of every kernel of one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] = times.get(event.name, 0.0) + event.device_time / 1000
    return times


def memory_rows(arguments, length: int, device: str) -> list[dict]:
    """Bytes that a layer of each cache holds after a prompt of `length` - 1 tokens and one token more.

    A growing cache with bounds has just made its room then: its ratio to the cache without is at its largest.
    """
    dim, dtype = arguments.head_dim, getattr(torch, arguments.dtype)
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads,
        head_dim=dim, hidden_size=arguments.heads * dim,
    )  # fmt: skip
    makers = {
        DynamicCache: lambda: DynamicCache(config=config),
        BoundedDynamicCache: lambda: BoundedDynamicCache(config),
        StaticCache: lambda: StaticCache(config=config, max_cache_len=length),
        BoundedStaticCache: lambda: BoundedStaticCache(config, max_cache_len=length),
    }
    rows = []
    for kind, make in makers.items():
        cache = make()
        for tokens in (length - 1, 1):
            states = torch.zeros(1, arguments.kv_heads, tokens, dim, dtype=dtype, device=device)
            cache.update(states, states, 0)
        rows.append({"cache": kind.__name__, "length": length, "bytes": _bytes_held(cache.layers[0])})
    for plain_cache, bounded in (rows[:2], rows[2:]):
        bounded["ratio"] = bounded["bytes"] / plain_cache["bytes"]
    return rows


def _bytes_held(layer) -> int:
    """The storage of all tensors of a cache's layer; views of one storage count once."""
    tensors = []
    for value in vars(layer).values():
        tensors += [one for one in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(one)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def step_table(rows: list[dict]) -> str:
    """The steps as a table; a ratio is to the faster of SDPA's two softmax kernels."""
    header = [
        "implementation",
        "cache",
        "batch",
        "noise",
        "ms",
        "ratio",
        "keys TB/s",
        "pages read",
        "support",
        "error",
    ]
    cells = []
    for row in rows:
        error = f"{row['error']:.1e}" if row.get("error") is not None else row.get("refused", "-")
        pages = row.get("pages_read")
        cells.append(
            [row["implementation"], str(row["length"]), str(row["batch"]), number(row["noise"], 2),
             number(row.get("ms"), 4), number(row.get("ratio")), number(row.get("keys_per_second_tb")),
             "-" if pages is None else f"{pages:.1%}", number(row.get("support"), 0), error]
        )  # fmt: skip
    return plain(header, cells)


def growth_table(rows: list[dict]) -> str:
    """What a step takes at the shortest and the longest cache, beside the keys with weight there."""
    ends = [pick(row["length"] for row in rows) for pick in (min, max)]
    cells = []
    for name, batch, noise in dict.fromkeys((row["implementation"], row["batch"], row["noise"]) for row in rows):
        first, last = (
            next(
                row
                for row in rows
                if (row["implementation"], row["batch"], row["noise"], row["length"]) == (name, batch, noise, length)
            )
            for length in ends
        )
        times = last["ms"] / first["ms"] if first.get("ms") and last.get("ms") else None
        support = " -> ".join(number(row.get("support"), 0) for row in (first, last))
        cells.append([name, str(batch), number(noise, 2), number(first.get("ms"), 3), number(last.get("ms"), 3),
                      number(times), support])  # fmt: skip
    return plain(["implementation", "batch", "noise", *(f"ms at {end}" for end in ends), "times", "support"], cells)


def memory_table(rows: list[dict]) -> str:
    """What one layer of each cache holds; a ratio is to the cache without bounds."""
    return plain(
        ["cache", "tokens", "MiB", "ratio"],
        [[row["cache"], str(row["length"]), number(row["bytes"] / 2**20, 1), number(row.get("ratio"), 4)]
         for row in rows],
    )  # fmt: skip


def _picture(rows: list[dict], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys((row["length"], row["batch"]) for row in rows))
    figure = Figure(figsize=(4.5 * len(cells), 4), layout="constrained")
    for index, (length, batch) in enumerate(cells):
        axes = figure.add_subplot(1, len(cells), index + 1, title=f"{batch} x {length} cached tokens")
        for name in dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != "eager"):
            points = [
                (row["noise"], row["ms"])
                for row in rows
                if (row["length"], row["batch"], row["implementation"]) == (length, batch, name) and row.get("ms")
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xlabel="share of noise in the scores", ylabel="ms per step", ylim=(0, None))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
