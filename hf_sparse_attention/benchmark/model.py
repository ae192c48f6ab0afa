"""One training step of a whole model with each map beside the same model with softmax on SDPA.

Forward, loss some tokens at a time, backward; the decoder layers compiled. Leaves a table and model.json: time, tokens
per second, model FLOP utilisation, peak memory, and how sparse the attention of the timed model is.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from .. import reference
from ..attention import implementation, record
from ..config import SparseAttentionConfig
from ..loading import find_model, load_model
from ..models import dense_config, new_parameter_names, sparse_config
from ..text import encode_documents, load_tokenizer, read_documents
from .arguments import fields_of, shape_of
from .inputs import BLOCK, DTYPES
from .rows import table, write_rows
from .timing import kernel_times, median, seconds, synchronize

# A Llama of 1.1 B parameters, together with 32 heads, 8 of keys, of 64.
ONE_BILLION = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# Tokens whose logits exist at once.
LOSS_CHUNK = 4096
# Loss of the compiled step against the same model run without compilation.
LOSS_TOLERANCE = 0.01
# Of the kernels whose time is asked for.
SHOWN_KERNELS = 12
SDPA, CUDNN = "softmax, sdpa", "softmax, sdpa cudnn"


@dataclass(frozen=True)
class Variant:
    """A model to be timed.

    Args:
        name: how its row is called.
        config: dense for softmax, else sparse.
        backend: a context in which SDPA takes a certain one of its kernels.
        optional: whether torch may refuse it.
        changes: fields of the kernels' `Configuration` that have other values.
    """

    name: str
    config: PreTrainedConfig
    backend: Callable[[], AbstractContextManager] = nullcontext
    optional: bool = False
    changes: dict = field(default_factory=dict)

    @property
    def is_sparse(self) -> bool:
        return getattr(self.config, "sparse_attention", None) is not None


def time_model(arguments, *, device: str = "cuda", backend: str = "inductor") -> list[dict]:
    """One row per length and implementation; a ratio is to the fastest softmax of that length.

    Args:
        backend: of torch.compile.

    Raises:
        RuntimeError: for a loss or a gradient that is not finite, a parameter without a gradient, a compiled loss that
            is not the uncompiled one's, a graph break, or too little memory.
    """
    config, weights, read = _source(arguments, device)
    variants = _variants(arguments, config, device)
    rows = []
    progress = tqdm([(length, variant) for length in arguments.lengths for variant in variants], desc="model")
    for length, variant in progress:
        progress.set_postfix_str(f"{length} tokens, {variant.name}")
        rows.append({"length": length, "implementation": variant.name})
        try:
            rows[-1] |= _measure(arguments, variant, weights, read(length), device, backend)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{variant.name}, {length} tokens: not enough memory; add --checkpointing, or give fewer --lengths or "
                "another --shape"
            ) from error
        except RuntimeError as error:
            if not variant.optional:
                raise RuntimeError(f"{variant.name}, {length} tokens: {error}") from error
            rows[-1]["refused"] = str(error).splitlines()[0][:200]
    for row in rows:
        softmax = [one["ms"] for one in rows if _is_softmax(one) and one["length"] == row["length"] and "ms" in one]
        if "ms" in row:
            row["ratio"] = row["ms"] / min(softmax)
    step = "forward, loss, backward" + (", fused AdamW" if arguments.optimizer else "")
    write_rows(arguments, device, "model.json", step=step, rows=rows)
    print(table(rows, COLUMNS))
    for row in (row for row in rows if "kernels_ms" in row):
        longest = list(row["kernels_ms"].items())[:SHOWN_KERNELS]
        print(
            f"{row['length']}, {row['implementation']}: " + ", ".join(f"{name[:60]} {ms:.2f}" for name, ms in longest)
        )
    print(f"A step is {step}. Empty blocks and keys with a weight: one group of heads per layer.")
    return rows


def _is_softmax(row: dict) -> bool:
    return row["implementation"] in (SDPA, CUDNN)


def _source(arguments, device: str):
    """Config of the model, its weights by name, and length -> its tokens (batch, length)."""
    if arguments.model is None:
        config = LlamaConfig(
            **ONE_BILLION | shape_of(arguments.shape),
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
            max_position_embeddings=max(arguments.lengths),
        )
        torch.manual_seed(arguments.seed)
        weights = _build(config, DTYPES[arguments.dtype], device).cpu().state_dict()

        def random_tokens(length: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(arguments.seed)
            return torch.randint(config.vocab_size, (arguments.batch, length), generator=generator).to(device)

        return config, weights, random_tokens
    source = find_model(arguments.model)
    model, _ = load_model(source, None, arguments.dtype)
    weights = model.state_dict()
    tokenizer = load_tokenizer(source.folder, source.config.vocab_size)
    needed = arguments.batch * max(arguments.lengths)
    # Any installation has the source of this package; it is text that a language model has seen the like of.
    names = arguments.text or sorted(str(file) for file in Path(__file__).parents[1].rglob("*.py"))
    documents = read_documents(names) if arguments.text else (Path(name).read_text("utf-8") for name in names)
    tokens = []
    for document in encode_documents(tokenizer, documents, batch=1):
        tokens += document
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:
        raise ValueError(f"the text holds {len(tokens)} tokens, fewer than the {needed} of a batch; name more --text")

    def read(length: int) -> torch.Tensor:
        return torch.tensor(tokens[: arguments.batch * length], device=device).view(arguments.batch, length)

    return source.config, weights, read


def _variants(arguments, config: PreTrainedConfig, device: str) -> list[Variant]:
    if getattr(config, "sparse_attention", None) is not None:
        settings = SparseAttentionConfig.from_model_config(config)
        if arguments.maps is not None or arguments.alpha is not None:
            raise ValueError(
                f"{arguments.model} is sparse and has its own map and alpha ({settings.map}, {settings.alpha:g}): "
                "leave maps and alpha out"
            )
        dense, sparse = dense_config(config), {settings.map: config}
    else:
        names = arguments.maps or ["entmax", "asentmax"]
        settings = [SparseAttentionConfig(map=name, alpha=arguments.alpha) for name in names]
        dense, sparse = config, {each.map: sparse_config(config, each) for each in settings}
    variants = [Variant(SDPA, dense)]
    if device == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        variants.append(Variant(CUDNN, dense, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION), optional=True))
    changes = {"": {}} | {f", {change}": fields_of(change) for change in arguments.changes}
    for changed in changes.values():
        # Refuses what is no field before anything is timed.
        with _configured(changed):
            pass
    return variants + [
        Variant(name + words, each, changes=changed)
        for name, each in sparse.items()
        for words, changed in changes.items()
    ]


def _configured(changes: dict) -> AbstractContextManager:
    """Without changes nothing is imported: the kernels need Triton."""
    if not changes:
        return nullcontext()
    from ..kernels.configurations import configured

    return configured(**changes)


def _build(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> nn.Module:
    sparse = getattr(config, "sparse_attention", None) is not None
    options = {} if sparse else {"attn_implementation": "sdpa"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def _with_weights(config, weights: dict[str, torch.Tensor], dtype, device: str) -> nn.Module:
    """A model of its own with the source's weights: a dense one without a map's parameters, a sparse one with all."""
    model = _build(config, dtype, device)
    names = set(model.state_dict())
    found = model.load_state_dict({name: one for name, one in weights.items() if name in names}, strict=False)
    # What a map adds starts at 0, and what a dense model lacks was the map's.
    if set(found.missing_keys) - set(new_parameter_names(model)):
        raise RuntimeError(f"the weights lack {', '.join(found.missing_keys[:4])}")
    return model.train()


def _measure(arguments, variant: Variant, weights, tokens, device: str, backend: str) -> dict:
    from ..train.distributed import checkpoint_activations
    from ..train.head import chunk_loss
    from ..train.throughput import flops_per_token, peak_flops

    torch._dynamo.reset()
    model = _with_weights(variant.config, weights, DTYPES[arguments.dtype], device)
    chunk_loss(model, LOSS_CHUNK)
    if arguments.checkpointing:
        checkpoint_activations(model)
    _compile(model, arguments.compile, backend)
    optimizer = None
    if arguments.optimizer:
        # A rate so small that bf16 weights stay what they are.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0, fused=True)
    row = {}
    with ExitStack() as stack:
        stack.enter_context(variant.backend())
        # Where the kernels do not compute a call, it raises.
        stack.enter_context(implementation("triton" if device == "cuda" else "auto"))
        stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        stack.enter_context(_configured(variant.changes))
        # Their keys do not say which kernel SDPA is to take, nor how ours are configured: a row would be that of what
        # is on disk.
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        synchronize(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["first_step_s"] = seconds(partial(_checked_step, model, tokens, row), device)
        call = partial(_step, model, tokens, optimizer)
        row["ms"] = median(call, arguments.repeats, device, clear=False)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if arguments.kernel_times:
            row["kernels_ms"] = kernel_times(call)
        row["tokens_per_second"] = tokens.numel() / row["ms"] * 1000
        flops, peak = flops_per_token(model, tokens.shape[1]), peak_flops(torch.device(device))
        if flops and peak:
            row["flop_utilisation"] = row["tokens_per_second"] * flops / peak
        row |= _look(model, tokens, variant.is_sparse)
        if not abs(row["loss_uncompiled"] - row["loss"]) <= LOSS_TOLERANCE * abs(row["loss"]):
            raise RuntimeError(f"the loss is {row['loss']} compiled and {row['loss_uncompiled']} without compilation")
    del model, optimizer, call
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def _compile(model: nn.Module, how: str, backend: str) -> None:
    if how == "none":
        return
    if how == "layers":
        from ..train.compilation import compile_parts

        compile_parts(model, fullgraph=True, backend=backend)
        return
    model.base_model.compile(fullgraph=True, dynamic=False, backend=backend)
    # The last tokens of a batch are fewer than the others.
    model._chunk_loss = torch.compile(model._chunk_loss, fullgraph=True, dynamic=True, backend=backend)


def _step(model, tokens, optimizer=None) -> torch.Tensor:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def _checked_step(model, tokens, row: dict) -> None:
    """A step after which the loss and every gradient are looked at."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    row["loss"] = loss.item()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    without = [name for name, one in trained.items() if one.grad is None]
    if without:
        raise RuntimeError(f"{len(without)} parameters got no gradient, first {without[0]}")
    squares = torch.stack([one.grad.float().square().sum() for one in trained.values()])
    row["gradient_norm"] = squares.sum().sqrt().item()
    broken = [name for name, square in zip(trained, squares.tolist(), strict=True) if not math.isfinite(square)]
    if not math.isfinite(row["loss"]) or broken:
        raise RuntimeError(
            f"the loss is {row['loss']} and the gradient's norm {row['gradient_norm']}, not finite"
            + (f"; first in {broken[0]}" if broken else "")
        )
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def _look(model, tokens, is_sparse: bool) -> dict:
    """Loss without compilation; of a sparse model also empty blocks, keys with a weight, and zero weights."""
    found = []

    def see(module, query, key, tau, *, query_scale, mask, **arguments):
        if tau is not None and module.is_sparse:
            found.append(_sparsity(query, key, tau, module.layer_idx, **arguments))

    # Compiled layers would be compiled anew for what is recorded.
    with torch.compiler.set_stance("force_eager"), record(see) if is_sparse else nullcontext():
        row = {"loss_uncompiled": model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()}
    if found:
        means = torch.stack(found).mean(0).tolist()
        row |= dict(zip(("empty_blocks", "support", "zeros"), means, strict=True))
    return row


def _sparsity(query, key, tau, layer: int, *, alpha, visible, slopes, causal, scaling) -> torch.Tensor:
    """(3,) share of empty blocks, keys with a weight per query, share of zero weights; of one group of heads."""
    group = query.shape[1] // key.shape[1]
    number = layer % key.shape[1]
    heads = slice(number * group, (number + 1) * group)
    one = (query[:1, heads], key[:1, number : number + 1], tau[:1, heads])
    arguments = {
        "alpha": alpha[heads] if isinstance(alpha, torch.Tensor) else alpha,
        "slopes": None if slopes is None else slopes[heads],
        "visible": None if visible is None else visible[:1],
        "scaling": scaling,
        "causal": causal,
    }
    queries, keys = query.shape[2], key.shape[2]
    if visible is None:
        end = torch.arange(keys - queries + 1, keys + 1, device=query.device)
        start = torch.zeros_like(end)
    else:
        start, end = visible[0].unbind(-1)
    seen = (end - start).clamp(min=0)
    # Blocks that hold a visible key, per block of queries.
    filling = -queries % BLOCK
    first = nn.functional.pad(torch.where(seen > 0, start, keys), (0, filling), value=keys).view(-1, BLOCK).amin(1)
    last = nn.functional.pad(torch.where(seen > 0, end, 0), (0, filling)).view(-1, BLOCK).amax(1)
    blocks = (-(-last // BLOCK) - first // BLOCK).clamp(min=0).sum() * group
    empty = 1 - reference.block_occupancy(*one, block=BLOCK, **arguments).sum() / blocks
    support = reference.support_size(*one, **arguments).float()
    return torch.stack([empty, support.mean(), 1 - support.sum() / (seen.sum() * group)]).float()


COLUMNS = (
    ("length", "length", "{:d}"),
    ("implementation", "implementation", "{}"),
    ("ms", "ms", "{:.1f}"),
    ("ratio", "ratio", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("flop_utilisation", "MFU", "{:.1%}"),
    ("peak_gib", "GiB", "{:.1f}"),
    ("empty_blocks", "empty blocks", "{:.0%}"),
    ("support", "support", "{:.0f}"),
    ("loss", "loss", "{:.3f}"),
    ("first_step_s", "first step s", "{:.1f}"),
    ("refused", "", "{}"),
)
