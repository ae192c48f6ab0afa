"""A model with random weights and a cache that is filled already -> tokens per second of generate, beside softmax."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from ..cache import BoundedStaticCache, update_page_bounds
from ..tables import number, plain
from .inputs import BLOCK

# The shape of Llama 3.2 1B.
ONE_BILLION = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
OURS, BOUNDED, DENSE = "ours", "ours, page bounds", "softmax, sdpa"
GENERATED = (DENSE, OURS, BOUNDED)
# Tokens that are generated before those that are timed.
WARM_UP = 4
# Times the tokens are generated: half a second each, in which a busy host shows.
REPEATS = 3


def time_generation(arguments, device: str, shape: dict, rows: list[dict], done: Callable) -> None:
    """Adds to the rows those that are missing: tokens per second of generate on caches filled with keys.

    Args:
        shape: fields of the LlamaConfig.
        done: called whenever there is one more row.
    """
    from ..models import sparse_config

    config, dtype = LlamaConfig(**shape), getattr(torch, arguments.dtype)
    known = {(row["length"], row["implementation"]) for row in rows}
    wanted = [(length, name) for length in arguments.cache_lengths for name in GENERATED]
    model = made = None
    with tqdm(total=len(wanted), desc="generate", unit="cache") as progress:
        for length, name in wanted:
            progress.set_postfix_str(f"{name}, {length} tokens: compiles")
            if (length, name) not in known:
                sparse = name != DENSE
                if made != sparse:
                    del model
                    torch.manual_seed(arguments.seed)
                    own = sparse_config(config, _entmax(arguments.alpha)) if sparse else config
                    how = {} if sparse else {"attn_implementation": "sdpa"}
                    with torch.device(device):
                        model = AutoModelForCausalLM.from_config(own, **how).to(dtype).eval()
                    made = sparse
                row = _generation_row(arguments, length, model, BoundedStaticCache if name == BOUNDED else StaticCache)
                rows.append({"length": length, "implementation": name} | row)
                done()
                progress.write(
                    f"{name}, {length} tokens: {row['tokens_per_second']:.1f} tokens/s, first "
                    f"{WARM_UP} tokens {row['first_seconds']:.1f} s"
                )
            progress.update()
    softmax = {row["length"]: row["tokens_per_second"] for row in rows if row["implementation"] == DENSE}
    for row in rows:
        row["ratio"] = row["tokens_per_second"] / softmax[row["length"]]


def _generation_row(arguments, length: int, model, kind: type) -> dict:
    config, device, noise = model.config, model.device, arguments.noise[0]
    heads, dim = config.num_key_value_heads, config.head_dim
    # What was compiled for another length or cache would be compiled once more for all of them.
    torch.compiler.reset()
    torch.manual_seed(arguments.seed)
    # The same block codes as the steps; the queries are the model's own, which has random weights.
    code = torch.nn.functional.normalize(torch.randn(1, heads, length // BLOCK, dim, device=device), dim=-1)
    code = (code * math.sqrt(dim * (1 - noise))).repeat_interleave(BLOCK, 2)
    cache = kind(config=config, max_cache_len=length + max(arguments.new_tokens, WARM_UP) + 8)
    cache.early_initialization(1, heads, dim, model.dtype, device)
    for layer in cache.layers:
        layer.keys[:, :, :length] = code + torch.randn_like(code) * math.sqrt(noise)
        layer.values[:, :, :length] = torch.randn_like(code)
        if kind is BoundedStaticCache:
            update_page_bounds(layer.keys, *layer.bounds()[:4], None, 0, length)
    ids = torch.zeros(1, length + 1, dtype=torch.long, device=device)
    seconds = []
    # The first time compiles, and is not counted.
    for tokens in (WARM_UP, *[arguments.new_tokens] * REPEATS):
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        seconds.append(_timed_generation(model, cache, ids, tokens))
    row = {"first_seconds": seconds[0], "tokens_per_second": arguments.new_tokens / statistics.median(seconds[1:])}
    if kind is BoundedStaticCache:
        row["layers_at_rest"] = sum(int(layer.state[0]) > 0 for layer in cache.layers)
        row["layers"] = len(cache.layers)
    return row


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


def generation_table(rows: list[dict]) -> str:
    """Whole generation as a table; a ratio is to softmax. The first tokens wait for what is compiled. At rest are the
    layers whose bounds did not help."""
    header = ["generate", "cache", "tokens/s", "ratio", "first s", "layers at rest"]
    return plain(
        header,
        [[row["implementation"], str(row["length"]), number(row["tokens_per_second"], 1), number(row["ratio"]),
          number(row["first_seconds"], 1),
          f"{row['layers_at_rest']} of {row['layers']}" if "layers" in row else "-"]
         for row in rows],
    )  # fmt: skip
