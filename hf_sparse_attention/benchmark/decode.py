"""This GPU -> time of one decoding step beside softmax, and tokens per second of a whole model.

Over cache length, batch and how peaked the scores are; steps are replayed from a CUDA graph. Leaves tables,
decode.json and decode.png.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from .. import reference
from ..cache import BoundedDynamicCache, BoundedStaticCache, update_page_bounds
from ..tables import number, plain
from .ours import difference, tolerance
from .rows import write_rows
from .timing import median, replay

logger = logging.getLogger(__name__)

BLOCK = 64
# The shape of Llama 3.2 1B.
ONE_BILLION = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
SOFTMAX = ("sdpa flash", "sdpa cudnn")
OURS, BOUNDED = "ours", "ours, page bounds"


def benchmark_decoding(arguments, *, device: str = "cuda", timer: Callable | None = None, shape=None) -> list[dict]:
    """One row per cache length, batch, noise and implementation; per length one of generation with each cache, and
    one of the memory of each cache.

    Raises:
        RuntimeError, ValueError: what the kernels say where they do not compute the inputs, or are far from float64.

    Args:
        arguments: a `BenchmarkArguments`.
        timer: a call -> its milliseconds, by default the median of replays of its CUDA graph.
        shape: fields of the LlamaConfig that generates, by default those of a model of 1 B parameters.
    """
    from ..kernels.decode import decoding

    timer = timer or (lambda call: median(replay(call), arguments.repeats))
    with decoding(True):
        rows, generated = _measure(arguments, device, timer, shape or ONE_BILLION)
    memory = [row for length in arguments.cache_lengths for row in memory_rows(arguments, length, device)]
    folder = write_rows(arguments, device, "decode.json", rows=rows, generation=generated, memory=memory)
    print(step_table(rows))
    if len(arguments.cache_lengths) > 1:
        print(growth_table(rows))
    if generated:
        print(generation_table(generated))
    print(memory_table(memory))
    _picture(rows, folder / "decode.png")
    return rows + generated + memory


def _measure(arguments, device, timer, shape) -> tuple[list[dict], list[dict]]:
    """Rows of single steps and rows of generation."""
    cells = [(length, batch) for length in arguments.cache_lengths for batch in arguments.batches]
    rows, softmax = [], {}
    progress = tqdm([(*cell, noise) for cell in cells for noise in arguments.noise], desc="decode", unit="input")
    for length, batch, noise in progress:
        progress.set_postfix_str(f"{batch} x {length} tokens, noise {noise}")
        group = _step_rows(arguments, length, batch, noise, device, timer, softmax)
        base = min((row["ms"] for row in group if row["implementation"] in SOFTMAX and row.get("ms")), default=None)
        for row in group:
            row["ratio"] = row["ms"] / base if base and row.get("ms") else None
        rows += group
    generated = []
    if arguments.new_tokens:
        for length in tqdm(arguments.cache_lengths, desc="generate", unit="length"):
            generated += _generation_rows(arguments, length, device, shape)
    return rows, generated


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
    """(lower, upper, radius) of the pages of keys (B, G, K, D)."""
    lower, upper = (key.new_zeros((*key.shape[:2], key.shape[2] // BLOCK, key.shape[3])) for _ in range(2))
    radius = lower.new_zeros(lower.shape[:3], dtype=torch.float32)
    update_page_bounds(key, lower, upper, radius, None, 0, key.shape[2])
    return lower, upper, radius


def _step_rows(arguments, length, batch, noise, device, timer, softmax) -> list[dict]:
    from ..kernels import entmax_attention
    from ..kernels.decode import share_of_pages_read

    query, key, value = cache_inputs(arguments, length, batch, noise, device)
    alpha = arguments.alpha
    # As a cache keeps them: where they do not help they rest.
    pages = (*page_bounds_of(key), torch.zeros(1, dtype=torch.int32, device=device))
    calls = {
        OURS: lambda: entmax_attention(query, key, value, alpha=alpha)[0],
        BOUNDED: lambda: entmax_attention(query, key, value, alpha=alpha, pages=pages)[0],
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
    rows = []
    for name, call in calls.items():
        row = {**common, "implementation": name}
        if name in (OURS, BOUNDED):
            # What ours do not compute raises: it is a fault here, where another kernel may have its reasons.
            row["ms"] = timer(call)
            row["error"] = difference([call()[:1]], [exact])
            if not row["error"] < tolerance(query.dtype):
                raise RuntimeError(f"{name}: the attention is {row['error']:.1e} away from float64")
            row["support"] = support.double().mean().item()
            row["milliseconds_of_kernels"] = _kernel_milliseconds(call) if device == "cuda" else {}
            if name == BOUNDED:
                row["pages_read"] = share_of_pages_read(query, key, pages, alpha=alpha)
        else:
            # The time of softmax does not depend on the noise.
            if (length, batch, name) not in softmax:
                softmax[length, batch, name] = _timed_or_refused(timer, call)
            row |= softmax[length, batch, name]
        if row.get("ms"):
            row["keys_per_second_tb"] = bytes_of_keys / row["ms"] / 1e9
        rows.append(row)
    return rows


def _timed_or_refused(timer: Callable, call: Callable) -> dict:
    """Of another's kernel, which says in errors of its own kind what it does not compute."""
    try:
        return {"ms": timer(call)}
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"refused": str(error).splitlines()[0][:200]}


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


def _generation_rows(arguments, length: int, device: str, shape: dict) -> list[dict]:
    """Tokens per second of generate on a cache that was filled with keys, without their prefill."""
    from ..models import sparse_config

    config, dtype = LlamaConfig(**shape), getattr(torch, arguments.dtype)
    torch.manual_seed(arguments.seed)
    # The same block codes as the steps; the queries are the model's own, which has random weights.
    heads, dim = config.num_key_value_heads, config.head_dim
    code = torch.nn.functional.normalize(torch.randn(1, heads, length // BLOCK, dim, device=device), dim=-1)
    noise = arguments.noise[0]
    code = (code * math.sqrt(dim * (1 - noise))).repeat_interleave(BLOCK, 2)
    rows, room = [], length + arguments.new_tokens + 8
    makers = {
        "softmax, sdpa": (StaticCache, lambda: AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")),
        OURS: (StaticCache, None),
        BOUNDED: (BoundedStaticCache, None),
    }
    model = None
    for name, (kind, dense) in makers.items():
        if dense is not None or rows[-1]["implementation"] not in (OURS, BOUNDED):
            del model
            make = dense or (lambda: AutoModelForCausalLM.from_config(sparse_config(config, _entmax(arguments.alpha))))
            with torch.device(device):
                model = make().to(dtype).eval()
        cache = kind(config=model.config, max_cache_len=room)
        cache.early_initialization(1, heads, dim, dtype, torch.device(device))
        for layer in cache.layers:
            layer.keys[:, :, :length] = code + torch.randn_like(code) * math.sqrt(noise)
            layer.values[:, :, :length] = torch.randn_like(code)
            if isinstance(cache, BoundedStaticCache):
                update_page_bounds(layer.keys, *layer.bounds()[:3], None, 0, length)
        ids = torch.zeros(1, length + 1, dtype=torch.long, device=device)
        row = {"length": length, "implementation": name}
        # The first time compiles, and is not counted.
        for tokens in (4, arguments.new_tokens):
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)
            seconds = _timed_generation(model, cache, ids, tokens)
        row["tokens_per_second"] = arguments.new_tokens / seconds
        rows.append(row)
    for row in rows:
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


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


def _entmax(alpha: float):
    from ..config import SparseAttentionConfig

    return SparseAttentionConfig(map="entmax", alpha=alpha)


def _timed_generation(model, cache, ids, tokens: int) -> float:
    synchronize = torch.cuda.synchronize if ids.is_cuda else lambda: None
    synchronize()
    started = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False,
    )  # fmt: skip
    synchronize()
    return time.perf_counter() - started


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
             number(row.get("ms"), 3), number(row.get("ratio")), number(row.get("keys_per_second_tb")),
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


def generation_table(rows: list[dict]) -> str:
    """Whole generation as a table; a ratio is to softmax."""
    header = ["generate", "cache", "tokens/s", "ratio"]
    return plain(
        header,
        [[row["implementation"], str(row["length"]), number(row["tokens_per_second"], 1), number(row["ratio"])]
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
