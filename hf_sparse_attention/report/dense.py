"""A dense checkpoint -> the model to be shown beside a sparse one: the same softmax, run where it can be looked at."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..checkpoint import examine, load_tokenizer
from ..config import SparseAttentionConfig
from ..loading import DTYPES, load_model
from ..models import sparse_layers


def load_dense_like(
    path: str, sparse: PreTrainedModel, tokenizer, *, prompt: str, dtype: str | None = None
) -> PreTrainedModel:
    """A dense model that can be compared with a sparse one head by head.

    Args:
        path: folder or Hub id of a dense checkpoint.
        tokenizer: that of the sparse model.
        prompt: what both are to read; their tokenizers must agree on it.
        dtype: of the parameters, one of `DTYPES`; None is the checkpoint's.

    Raises:
        ValueError: if it is sparse, or has other layers, heads or tokens than the sparse model.
        OSError: if it cannot be read.
    """
    checkpoint = examine(path)
    if checkpoint.sparse is not None:
        raise ValueError(f"dense is {path}, which is sparse ({checkpoint.map}); name the dense model to compare with")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    for name in ("num_hidden_layers", "num_attention_heads", "vocab_size"):
        ours, theirs = getattr(sparse.config, name), getattr(checkpoint.config, name, None)
        if ours != theirs:
            raise ValueError(f"dense {path} has {name} {theirs}, the sparse model {ours}: they cannot be compared")
    other = load_tokenizer(checkpoint.source.folder)
    if other(prompt)["input_ids"] != tokenizer(prompt)["input_ids"]:
        raise ValueError(f"dense {path} splits the prompt into other tokens than the sparse model")
    # entmax with alpha 1 is softmax: nothing is converted, but the attention passes where it is recorded.
    settings = SparseAttentionConfig(map="entmax", alpha=1.0, layers=tuple(sparse_layers(sparse.config)))
    model, _ = load_model(checkpoint.source, settings, dtype)
    return model.eval().to(torch.device(sparse.device))
