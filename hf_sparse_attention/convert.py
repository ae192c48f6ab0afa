"""A dense model enters (folder or Hub id), leaves a folder with the same weights, bit for bit, in the sparse class of
its family, the new parameters at their neutral start, tokenizer and generation config beside them.

    hf-sparse-attention convert --model path/or/hub-id --output sparse-model --map asentmax
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .config import LAYERS, POSITIONS, SPECIFICATIONS, VERSION, SparseAttentionConfig
from .files import fingerprint, is_empty, whole_folder, write_json
from .loading import (
    RECORD,
    Source,
    Tensors,
    check_dtype,
    check_settings,
    check_weights,
    companions_of,
    count_parameters,
    find_model,
    load_model,
    make_settings,
)
from .models import check_convertible, with_rope
from .text import load_tokenizer

logger = logging.getLogger(__name__)


ROPE = ("rope_theta", "rope_yarn", "max_positions")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class ConvertArguments:
    """Options of `convert`."""

    model: str = field(metadata=_help("dense model: a folder or a Hub id"))
    output: str = field(metadata=_help("folder of the sparse model; it must not exist, or be empty"))
    map: str = field(default="asentmax", metadata=_help(f"attention map: {', '.join(SPECIFICATIONS)}"))
    alpha: float | None = field(
        default=None, metadata=_help("alpha of entmax; 1 is softmax (default: the map's own, entmax 1.5, sparsemax 2)")
    )
    position: str = field(default="rope", metadata=_help(f"position scheme: {', '.join(POSITIONS)}"))
    layers: str = field(
        default="all", metadata=_help(f"layers with sparse attention: {', '.join(LAYERS)}, or numbers such as 0,2,5")
    )
    heads: str = field(
        default="all",
        metadata=_help(
            "heads with sparse attention in those layers: all, numbers such as 0,1,4, or layer:heads words such as "
            "'0:0,1 3:2' (layers left out: all); the others keep the dense model's softmax. Whole groups of heads "
            "that share a key head cost least"
        ),
    )
    train_length: int | None = field(
        default=None,
        metadata=_help("tokens in a training context, over which SSMax starts neutral (default: the model's own)"),
    )
    rope_theta: float | None = field(
        default=None, metadata=_help("new base of the rotary frequencies, for longer contexts (default: the model's)")
    )
    rope_yarn: float | None = field(
        default=None, metadata=_help("YaRN factor: rotary positions reach so many times further (default: none)")
    )
    max_positions: int | None = field(
        default=None, metadata=_help("positions the model then reaches (default: its own, times rope_yarn)")
    )
    dtype: str | None = field(
        default=None, metadata=_help("float32, bfloat16 or float16 (default: as the checkpoint's)")
    )
    revision: str | None = field(default=None, metadata=_help("branch, tag or commit of a model on the Hub"))
    max_shard_size: str | None = field(
        default=None, metadata=_help("largest weight file, such as 5GB (default: about as the checkpoint's)")
    )
    overwrite: bool = field(
        default=False, metadata=_help("replace an earlier conversion in the output folder; nothing else is replaced")
    )


def convert_model(arguments: ConvertArguments) -> Path:
    """Writes the sparse model and returns its folder. A second run with the same arguments changes nothing.

    Raises:
        ValueError: for arguments or a model that cannot be converted, a tokenizer that does not fit, or tensors that
            the model does not know or lacks.
        FileExistsError: if the output folder holds anything but this very conversion.
        OSError: if the model is missing or corrupt, a download breaks off, or the disk is full.
    """
    settings = make_settings(
        arguments.map, arguments.alpha, arguments.position, arguments.layers, arguments.train_length,
        arguments.heads,
    )  # fmt: skip
    check_dtype(arguments.dtype)
    output = Path(arguments.output).expanduser()
    _check_output(output, arguments)
    source = find_model(arguments.model, arguments.revision, check=check_convertible)
    _check_apart(source.folder, output)
    rope = {"theta": arguments.rope_theta, "yarn": arguments.rope_yarn, "max_positions": arguments.max_positions}
    source = replace(source, config=with_rope(source.config, **rope))
    settings = check_settings(source, settings)
    companions = companions_of(source.folder)
    if any(file.name.startswith("tokenizer") for file in companions):
        load_tokenizer(source.folder, source.config.get_text_config().vocab_size)

    identity = _identity(source, settings, arguments)
    if not is_empty(output) and output.exists() and _finished(output, identity, arguments.overwrite):
        _complete_record(output, source)
        print(f"{output} already holds this conversion of {arguments.model}: nothing to do")
        return output

    model, tensors = load_model(source, settings, arguments.dtype)
    with whole_folder(output, replace=arguments.overwrite) as folder:
        model.save_pretrained(folder, max_shard_size=arguments.max_shard_size or _shard_size(source, model))
        for file in companions:
            shutil.copyfile(file, folder / file.name)
        cast = _check_kept(model, source, folder, tensors)
        record = {**identity, "commit": source.commit, "version": VERSION, "kept": len(tensors.kept)}
        record |= {"new": tensors.new, "cast": cast, "files": _sizes(folder)}
        # Whoever trains it may write over them.
        record["weights"] = fingerprint(check_weights(folder))
        # By which runs of this folder and of the dense model know that they began with the same weights.
        record["dense_weights"] = fingerprint(source.weights)
        write_json(folder / RECORD, record)
    new_parameters = sum(model.get_parameter(name).numel() for name in tensors.new)
    print(
        f"{arguments.model} -> {output}: {settings.map}, alpha {settings.alpha:g}, position {settings.position}, "
        f"{count_parameters(model):,} parameters of which {new_parameters:,} new\n{tensors}\n"
        + (f"      cast: {cast} to {str(model.dtype).removeprefix('torch.')}\n" if cast else "")
        + "The kept weights were read back and are equal bit for bit"
        + (" after the cast." if cast else ".")
        + (
            ""
            if settings.position == "rope"
            else f"\nThe {settings.position} model computes another function than the dense one, also at alpha 1: its "
            "rotary positions are gone, and it has to be trained without them."
        )
    )
    return output


def _check_output(output: Path, arguments: ConvertArguments) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, not a folder")
    if output.exists() and not is_empty(output) and not (output / RECORD).is_file():
        raise FileExistsError(
            f"{output} exists, is not empty and has no {RECORD}: it is no conversion. "
            "Name another --output or remove it"
        )
    source = Path(arguments.model).expanduser()
    if source.exists():
        _check_apart(source, output)


def _check_apart(source: Path, output: Path) -> None:
    source, output = source.resolve(), output.resolve()
    if source == output or source in output.parents:
        raise ValueError(f"output {output} is the source folder or inside it: a source is never written to")
    if output in source.parents and output.exists():
        raise ValueError(f"output {output} holds the source folder {source}: a source is never written over")


def _identity(source: Source, settings: SparseAttentionConfig, arguments: ConvertArguments) -> dict:
    """What makes two conversions the same: the same bytes converted in the same way."""
    files = [*source.weights, source.folder / "config.json", *companions_of(source.folder)]
    block = settings.to_dict()
    del block["version"]
    return {
        "model": arguments.model,
        "revision": arguments.revision,
        "sparse_attention": block,
        "dtype": arguments.dtype,
        **{name: getattr(arguments, name) for name in ROPE},
        "max_shard_size": arguments.max_shard_size,
        "source_sha256": {file.name: _sha256(file) for file in files},
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return (
            hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(opened)
        )


def _digest(opened) -> str:
    # Python 3.10 has no file_digest.
    digest = hashlib.sha256()
    while piece := opened.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def _finished(output: Path, identity: dict, overwrite: bool) -> bool:
    """Whether `output` is the same conversion, whole; False if it may be replaced."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        record = {}
    different = [key for key, value in identity.items() if record.get(key) != value]
    sizes = _sizes(output)
    lost = [name for name, size in record.get("files", {}).items() if sizes.get(name) != size]
    if not lost and "weights" in record and record["weights"] != fingerprint(check_weights(output)):
        lost = ["weights"]
    if not different and not lost:
        return True
    if overwrite:
        return False
    if different:
        reason = f"holds another conversion (different: {', '.join(different)})"
    else:
        reason = f"holds this conversion, but {', '.join(lost)} changed since"
    raise FileExistsError(f"{output} {reason}; name another --output, or replace it with --overwrite")


def _complete_record(output: Path, source: Source) -> None:
    """A conversion of an earlier version does not name its dense weights, which are the same bytes as now."""
    record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    if "dense_weights" not in record:
        write_json(output / RECORD, {**record, "dense_weights": fingerprint(source.weights)})


def _shard_size(source: Source, model: PreTrainedModel) -> int:
    """Largest weight file in bytes such that there are about as many as the source has."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if len(source.weights) == 1:
        return 2 * total
    sizes = [file.stat().st_size for file in source.weights]
    return math.ceil(max(sizes) * max(1.0, total / sum(sizes)) * 1.02)


def _check_kept(model: PreTrainedModel, source: Source, folder: Path, tensors: Tensors) -> int:
    """Reads back what was written and compares it with the source, tensor by tensor; returns how many were cast.

    A source in another layout than the model's (experts regrouped on loading) is compared with the loaded model.

    Raises:
        RuntimeError: if any kept tensor differs.
    """
    original = {}
    for file in source.weights:
        with safe_open(file, framework="pt") as opened:
            original |= dict.fromkeys(opened.keys(), file)
    kept, cast, written = set(tensors.kept), 0, set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                written.add(name)
                if name in tensors.new:
                    continue
                stored = opened.get_tensor(name)
                if name in original:
                    with safe_open(original[name], framework="pt") as dense:
                        expected = dense.get_tensor(name)
                elif name in kept:
                    expected = model.get_parameter(name).detach()
                else:
                    continue
                if expected.dtype != stored.dtype:
                    cast += 1
                    expected = expected.to(stored.dtype)
                if not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (expected, stored))):
                    raise RuntimeError(f"{name} was not written as it was read: the conversion is not kept")
    lost = set(tensors.new) - written
    if lost:
        raise RuntimeError(f"{len(lost)} new parameters were not written, first {min(lost)}")
    return cast
