"""A sparse model folder -> the files of its upload, name by name: weights and tokenizer as they are, a config that
names the package, the module that asks for it. The folder is only read; what is no sound sparse model is refused."""

from __future__ import annotations

import json
import logging
import re
from importlib.resources import files as resources
from pathlib import Path

import torch
from safetensors import safe_open

from ..checkpoint import Checkpoint, examine
from ..loading import check_weights, companions_of
from ..models import (
    AUTO_CLASSES,
    CLASSES,
    MODULE,
    NEW_PARAMETER,
    auto_map,
    family_of,
    module_source,
    new_parameter_names,
    sparse_class,
)

logger = logging.getLogger(__name__)

_SECRET = re.compile(rb"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}")

# A file of an upload: its place on the disk, or its bytes.
Files = dict[str, "Path | bytes"]


def data_file(name: str) -> bytes:
    """A file of the package's data folder."""
    return (resources("hf_sparse_attention") / "data" / name).read_bytes()


def sound_model(path: str) -> tuple[Checkpoint, int]:
    """The model of a folder, found sound, and the number of its parameters.

    Raises:
        OSError: if there is no model, or its weights are missing, pickled or cut off.
        ValueError: for a dense model, an adapter, or a config and weights of two different models.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise OSError(f"model is {path}, which is not a folder; push uploads a folder that convert or train wrote")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} is an adapter, not a model: train with --lora_save merge, or merge it into its model"
        )
    checkpoint = examine(str(folder))
    if checkpoint.sparse is None:
        raise ValueError(
            f"{path} is a dense model ({checkpoint.config.model_type}): convert it first, or upload it with "
            "push_to_hub"
        )
    return checkpoint, _check_tensors(checkpoint, check_weights(folder))


def kind_of(checkpoint: Checkpoint) -> str:
    """Which model class was saved: Model, ForCausalLM or ForSequenceClassification."""
    saved = (checkpoint.config.architectures or [None])[0]
    family = family_of(checkpoint.config)
    for kind in AUTO_CLASSES:
        found = sparse_class(family, kind)
        if found is not None and found.__name__ == saved:
            return kind
    raise ValueError(
        f"{checkpoint.path}/config.json has architectures {saved!r}, which is none of this family's classes: "
        f"{', '.join(name for name in CLASSES if name.startswith(type(checkpoint.config).__name__[:-6]))}"
    )


def _check_tensors(checkpoint: Checkpoint, weights: tuple[Path, ...]) -> int:
    """The map's parameters are those the config asks for; returns the number of all parameters."""
    stored, count = set(), 0
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored.add(name)
                count += torch.Size(tensors.get_slice(name).get_shape()).numel()
    with torch.device("meta"):
        model = sparse_class(family_of(checkpoint.config), kind_of(checkpoint))(checkpoint.config)
    wanted, found = set(new_parameter_names(model)), {name for name in stored if NEW_PARAMETER.search(name)}
    for names, fault in ((wanted - found, "lacks"), (found - wanted, "has beyond those of this map")):
        if names:
            raise ValueError(
                f"{checkpoint.path}: config.json says {checkpoint.map}, but the checkpoint {fault} {len(names)} "
                f"parameters, first {min(names)}: config and weights are of two different models"
            )
    return count


def auto_class(checkpoint: Checkpoint) -> str:
    """The Auto class that loads the model."""
    return AUTO_CLASSES[kind_of(checkpoint)]


def collect(checkpoint: Checkpoint, card: str, licence: Path | None) -> Files:
    """Every file of the upload by its name there.

    Raises:
        ValueError: if one of them holds an access token.
    """
    folder = Path(checkpoint.path)
    found: Files = {file.name: file for file in (*check_weights(folder), *companions_of(folder))}
    if len(check_weights(folder)) > 1:
        found["model.safetensors.index.json"] = folder / "model.safetensors.index.json"
    if licence is not None:
        found.setdefault(licence.name, licence)
    if not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in found):
        logger.warning("%s has no tokenizer: users of the model will have to find one that fits", folder)
    found["config.json"] = _config(checkpoint)
    found[f"{MODULE}.py"] = module_source()
    found["README.md"] = card.encode()
    _refuse_secrets(found)
    return dict(sorted(found.items()))


def _config(checkpoint: Checkpoint) -> bytes:
    config = json.loads((Path(checkpoint.path) / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = auto_map(family_of(checkpoint.config))
    config.pop("_name_or_path", None)
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _refuse_secrets(found: Files) -> None:
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for name, content in found.items():
        if name.endswith(".safetensors"):
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if _SECRET.search(text) or (token and token in text):
            raise ValueError(
                f"{name} holds what looks like an access token of the Hub: remove it before anything is sent"
            )
