"""A folder or Hub id -> a model that computes what its config says, ready to be measured, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .config import SparseAttentionConfig
from .loading import DTYPES, Source, find_model, load_model
from .models import attention_layers

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")
# Fields of a config.json that say nothing of what the model computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "auto_map")


@dataclass(frozen=True)
class Checkpoint:
    """A model that was looked at, but not loaded.

    Args:
        source: its folder, config and weight files.
        sparse: what its attention computes, or None for a dense model.
        fingerprint: changes whenever the config or the weights do.
    """

    source: Source
    sparse: SparseAttentionConfig | None
    fingerprint: str

    @property
    def path(self) -> str:
        """What the user called it: a folder or Hub id."""
        return self.source.name

    @property
    def config(self) -> PreTrainedConfig:
        return self.source.config

    @property
    def map(self) -> str:
        """The attention map; "softmax" for a dense model."""
        return "softmax" if self.sparse is None else self.sparse.map

    @property
    def positions(self) -> int | None:
        """max_position_embeddings, where the config has it."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def examine(path: str | Path) -> Checkpoint:
    """Looks at a checkpoint.

    Raises:
        OSError: if there is none, or weights are missing or cut off.
        ValueError: if it is an adapter, or its config says two things.
    """
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{path} is an adapter, not a model: merge it into its base model first")
    source = find_model(str(path))
    is_sparse = source.config.model_type.startswith("sparse_")
    if not is_sparse and getattr(source.config, "sparse_attention", None) is not None:
        raise ValueError(
            f"{path} has `sparse_attention` in its config but model_type {source.config.model_type!r}, which would "
            "run it as softmax: config.json was changed by hand or by another program"
        )
    sparse = SparseAttentionConfig.from_model_config(source.config) if is_sparse else None
    return Checkpoint(source, sparse, _fingerprint(source))


def _fingerprint(source: Source) -> str:
    saved = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in saved.items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in source.weights:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def load_tokenizer(path: str | Path):
    """The tokenizer of a model folder or Hub id.

    Raises:
        OSError: if it has none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} has no tokenizer that can be loaded: {error}") from error


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" is a GPU if there is one.

    Raises:
        ValueError: for a device that is not there.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; choose one of {', '.join(DEVICES)}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', which this machine has not")
    return device


def check_dtype(name: str) -> str:
    """Returns the name if it is "auto" (the checkpoint's own) or one of `DTYPES`."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; choose one of auto, {', '.join(DTYPES)}")
    return name


def load(checkpoint: Checkpoint, *, dtype: str = "auto", device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model in evaluation mode.

    Raises:
        ValueError: if the weights do not fit the config, or the model that came is not what the config says.
        OSError: if the weights cannot be read.
    """
    model, _ = load_model(checkpoint.source, None, None if dtype == "auto" else check_dtype(dtype))
    if bool(attention_layers(model)) != (checkpoint.sparse is not None):
        raise ValueError(f"{checkpoint.path} says it computes {checkpoint.map}, but loads as {type(model).__name__}")
    return model.eval().to(device)
