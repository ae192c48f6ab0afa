"""A model's name enters (folder or Hub id), leaves a folder whose weights were checked, and from it the model, dense
or sparse, with a report of every tensor. Commands that start from a dense model begin here."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .config import SPECIFICATIONS, SparseAttentionConfig
from .files import fingerprint
from .models import FAMILIES, ONLY_SAFETENSORS, check_convertible, new_parameter_names, sparse_config

# What is fetched of a model on the Hub beside its weights, and what of it goes along into a converted folder.
COMPANIONS = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What a converted folder that was not trained yet says about where it came from.
RECORD = "conversion.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """A model folder on this machine.

    Args:
        name: what the user called it.
        folder: where it is.
        commit: the commit of a model on the Hub, or None.
        config: its config.
        weights: its weight files, checked to be there and whole.
    """

    name: str
    folder: Path
    commit: str | None
    config: PreTrainedConfig
    weights: tuple[Path, ...]

    @property
    def is_sparse(self) -> bool:
        return getattr(self.config, "sparse_attention", None) is not None

    @property
    def is_untrained(self) -> bool:
        """Whether its weights have only ever been trained with softmax."""
        return not self.is_sparse or (self.folder / RECORD).is_file()

    @property
    def record(self) -> dict:
        """What `convert` wrote of a folder that was not trained yet; empty for any other."""
        file = self.folder / RECORD
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_record(source: Source) -> None:
    """Raises ValueError if a folder of `convert` has other weights than were written: its record, by which it counts
    as a model that was only trained with softmax, is then of another model."""
    written = source.record.get("weights")
    if written is not None and written != fingerprint(source.weights):
        raise ValueError(
            f"{source.name} has a {RECORD}, which says that it was converted and not trained, but its weights changed "
            f"since: remove {RECORD} if they were trained with the map, or convert the dense model again"
        )


@dataclass(frozen=True)
class Tensors:
    """Names of a loaded model's tensors: those of the checkpoint, those its map adds, and those that should not be."""

    kept: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for kind in ("kept", "new", "missing", "unexpected"):
            names = getattr(self, kind)
            shown = f"  {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else ""
            lines.append(f"{kind:>10}: {len(names)}{shown}")
        return "\n".join(lines)


def find_model(
    name: str, revision: str | None = None, check: Callable[[PreTrainedConfig], object] | None = None
) -> Source:
    """The folder of a model, fetched from the Hub if it is not one already, with every weight file opened once.

    Args:
        check: raises for a config of a model that cannot be used; called before any weights are fetched.

    Raises:
        OSError: if there is no such model, the download broke off, or a weight file is missing or cut off.
        ValueError: for a revision of a local folder, or a config that cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {name} is a local folder, which has none")
        if not folder.is_dir():
            raise NotADirectoryError(f"{name} is a file; a model is a folder with config.json and weights")
        config, commit = _config(folder, name, check), None
    else:
        config = _config(_download(name, revision, ["config.json"]), name, check)
        folder = _download(name, revision, ["config.json", *COMPANIONS, "*.safetensors*"])
        # The Hub's cache keeps a model in a folder named after its commit.
        commit = folder.name
    return Source(name, folder, commit, config, check_weights(folder, name))


def _config(folder: Path, name: str, check: Callable[[PreTrainedConfig], object] | None) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json: it is not a model folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{name}/config.json cannot be read: {error}") from error
    if check is not None:
        check(config)
    return config


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # Sub-folders and consolidated files hold the same weights in their makers' own format.
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: it is neither a folder nor a readable model on the Hub"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r}") from error
    except Exception as error:
        raise OSError(
            f"{name} is no folder here, and could not be fetched completely from the Hub ({type(error).__name__}: "
            f"{error}). What has arrived is kept: run the command again to go on"
        ) from error
    return Path(folder)


def check_weights(folder: Path, name: str | None = None) -> tuple[Path, ...]:
    """Every weight file of a folder, opened.

    Raises:
        FileNotFoundError: if there are none but pickled ones, or one that the index names is missing.
        OSError: if a file is cut off or is not what its name says.
    """
    name = name or str(folder)
    files, expected = [folder / SINGLE], {}
    if not files[0].is_file():
        index = folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"{name} has no weights, neither {SINGLE} nor {INDEX}. {ONLY_SAFETENSORS}")
        try:
            for tensor, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                expected.setdefault(shard, set()).add(tensor)
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise OSError(f"{name}/{index.name} is not an index of weights: {error}") from error
        if pickled := sorted(shard for shard in expected if not shard.endswith(".safetensors")):
            raise OSError(f"{name}/{index.name} names {pickled[0]}. {ONLY_SAFETENSORS}")
        files = [folder / shard for shard in sorted(expected)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{name} lacks {file.name}, one of its {len(files)} weight files")
        try:
            with safe_open(file, framework="pt") as tensors:
                absent = expected.get(file.name, set()) - set(tensors.keys())
        except SafetensorError as error:
            raise OSError(f"{name}/{file.name} is corrupt or cut off: {error}") from error
        if absent:
            raise OSError(f"{name}/{file.name} lacks {len(absent)} tensors of the index, first {min(absent)}")
    return tuple(files)


def companions_of(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and licence of a model folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in COMPANIONS)]


def check_dtype(dtype: str | None, field_name: str = "dtype") -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{field_name} is {dtype!r}; choose one of {', '.join(DTYPES)}")


def check_settings(source: Source, settings: SparseAttentionConfig) -> SparseAttentionConfig:
    """The settings a dense model will be converted with, complete; raises ValueError if it cannot be."""
    check_convertible(source.config)
    return SparseAttentionConfig.from_model_config(sparse_config(source.config, settings))


def load_model(
    source: Source,
    settings: SparseAttentionConfig | None,
    dtype: str | None = None,
    without: Collection[str] | None = None,
) -> tuple[PreTrainedModel, Tensors]:
    """The model of a folder: converted if `settings` are given, else what the folder says, sparse or dense.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.
        without: names of the tensors, perhaps none, of a sparse checkpoint that its dense model, whose config `source`
            has, leaves out; None loads what the folder is.

    Raises:
        ValueError: if the checkpoint has tensors that the model does not know or lacks some that it needs.
        OSError: if the weights cannot be read.
    """
    options = {}
    if settings is not None:
        options = {"attn_implementation": settings.map, "sparse_attention": settings.to_dict()}
    loader = AutoModelForCausalLM
    if without is not None:
        # The Auto class refuses a dense config for a sparse folder, which is what is meant here.
        loader = FAMILIES[source.config.model_type].dense("ForCausalLM")
    try:
        with _without_advice(*(["transformers.modeling_utils"] if without else [])):
            model, info = loader.from_pretrained(
                source.folder,
                config=copy.deepcopy(source.config),
                dtype=dtype or "auto",
                output_loading_info=True,
                **options,
            )
    except (SafetensorError, EOFError) as error:
        raise OSError(f"the weights of {source.name} cannot be read: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"the weights of {source.name} do not fit its config: {error}") from error
    new = set(new_parameter_names(model)) if settings is not None else set()
    missing = set(info["missing_keys"])
    kept = [name for name, _ in model.named_parameters() if name not in new | missing]
    unexpected = set(info["unexpected_keys"]) - set(without or ())
    tensors = Tensors(kept, sorted(new), sorted(missing - new), sorted(unexpected))
    if tensors.missing or tensors.unexpected or info.get("mismatched_keys"):
        raise ValueError(f"the weights of {source.name} do not fit its config:\n{tensors}")
    return model, tensors


@contextmanager
def _without_advice(*others: str) -> Iterator[None]:
    """Loading a dense model with one of our maps advises to convert and train it, which is what is being done.

    Args:
        others: further loggers whose warnings are of what is meant to be.
    """
    loggers = [logging.getLogger(name) for name in ("hf_sparse_attention.models.pretrained", *others)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def parse_layers(text: str) -> str | tuple[int, ...]:
    """`all`, `full_attention` or `0,2,5` -> what `SparseAttentionConfig.layers` takes."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if parts and all(part.isdigit() for part in parts):
        return tuple(int(part) for part in parts)
    return text


def parse_heads(text: str) -> str | tuple[int, ...] | dict[int, tuple[int, ...]]:
    """`all`, `0,1,4`, or `0:0,1 3:2` (layer:heads) -> what `SparseAttentionConfig.heads` takes."""
    if ":" not in text:
        return parse_layers(text)
    chosen = {}
    for word in text.split():
        layer, _, heads = word.partition(":")
        parsed = parse_layers(heads)
        if not layer.isdigit() or isinstance(parsed, str) or int(layer) in chosen:
            raise ValueError(f"heads has {word!r}; write layer:heads once for each layer, such as 0:0,1 3:2")
        chosen[int(layer)] = parsed
    return chosen


def make_settings(
    map_name: str, alpha: float | None, position: str, layers: str, train_length: int | None, heads: str = "all"
) -> SparseAttentionConfig:
    """Checked settings of a command's arguments."""
    if map_name not in SPECIFICATIONS:
        raise ValueError(f"map is {map_name!r}; choose one of {', '.join(SPECIFICATIONS)}")
    return SparseAttentionConfig(
        map=map_name, alpha=alpha, position=position, layers=parse_layers(layers), heads=parse_heads(heads),
        train_length=train_length,
    )  # fmt: skip


def count_parameters(model: torch.nn.Module, *, trainable: bool = False) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable)
