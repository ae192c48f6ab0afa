"""What is timed, and where the results go: the options of `benchmark`, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from transformers import LlamaConfig

from ..config import SPECIFICATIONS
from .inputs import BLOCK, DTYPES
from .peers import PEERS


@dataclass(frozen=True)
class Kind:
    """Something that can be timed.

    Args:
        meaning: what it is, for the help.
        options: fields of the arguments that it reads, besides those that all of them read.
        lengths: tokens, if none are given.
    """

    meaning: str
    options: frozenset[str]
    lengths: tuple[int, ...] = (8192, 32768)


_ATTENTION = frozenset(["lengths", "alpha", "batch", "heads", "kv_heads", "head_dim", "dtype"])
KINDS = {
    "attention": Kind(
        "the kernels beside softmax and other entmax kernels",
        _ATTENTION | {"noise", "repeats", "peers", "changes", "kernel_times"},
    ),
    "decode": Kind(
        "one query against a cache, and whole generation (also: --decode)",
        _ATTENTION - {"lengths", "batch"} | {"noise", "repeats", "cache_lengths", "batches", "new_tokens"},
    ),
    "model": Kind(
        "one training step of a whole model beside the same model with softmax (also: --model FOLDER)",
        _ATTENTION
        | {
            "repeats",
            "model",
            "shape",
            "maps",
            "text",
            "compile",
            "checkpointing",
            "optimizer",
            "changes",
            "kernel_times",
        },
        (8192,),
    ),
    "packing": Kind(
        "documents packed into one sequence beside the documents alone",
        _ATTENTION | {"noise", "repeats", "documents"},
        (32768,),
    ),
    "slopes": Kind("heads with ALiBi slopes beside heads without", _ATTENTION | {"noise", "repeats"}, (32768,)),
    "grid": Kind("small and ugly shapes with every mask beside the PyTorch reference", frozenset({"repeats"})),
    "cold": Kind(
        "the first call: in a new process without a compiled kernel, and at a new length",
        _ATTENTION,
        (8192, 8191, 1000, 63, 20000),
    ),
    "tune": Kind(
        "launch parameters, tried for this card; the best go to configurations.json (also: --tune)",
        _ATTENTION | {"noise", "repeats"},
    ),
}
# Kinds whose inputs are not made of blocks.
_ANY_LENGTH = ("cold",)
COMPILED = ("layers", "model", "none")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class BenchmarkArguments:
    """What is timed, and where the results go."""

    what: str = field(
        default="attention", metadata=_help("; ".join(f"{name}: {kind.meaning}" for name, kind in KINDS.items()))
    )
    decode: bool = field(default=False, metadata=_help("short for --what decode"))
    tune: bool = field(default=False, metadata=_help("short for --what tune"))
    lengths: list[int] | None = field(
        default=None,
        metadata=_help(
            "tokens, multiples of 64; by default 8192 and 32768, in model 8192, in packing and slopes 32768, in cold "
            "8192 and then other lengths"
        ),
    )
    noise: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.6, 0.9],
        metadata=_help("share of noise in queries and keys, 0 to 1: more noise, fewer empty blocks"),
    )
    alpha: float | None = field(
        default=None, metadata=_help("of the kernels, in (1, 4]; by default 1.5, in model each map's own")
    )
    batch: int = field(default=1, metadata=_help("sequences"))
    heads: int = field(default=32, metadata=_help("query heads"))
    kv_heads: int = field(default=8, metadata=_help("key and value heads"))
    head_dim: int | None = field(default=None, metadata=_help("dimension of a head; by default 128, in model 64"))
    dtype: str = field(default="bfloat16", metadata=_help(f"one of {', '.join(DTYPES)}"))
    repeats: int = field(default=10, metadata=_help("timed calls, of which the median counts"))
    seed: int = field(default=0, metadata=_help("of the inputs"))
    output_dir: str = field(default="benchmark", metadata=_help("folder for the JSON file and the picture"))
    peers: list[str] = field(
        default_factory=lambda: list(PEERS),
        metadata=_help(
            f"attention: what is timed beside the kernels, of {', '.join(PEERS)}; by default all, AdaSplash 1 (keys "
            "and values repeated for it, as it has no grouped heads) and 2 if adasplash is installed"
        ),
    )
    changes: list[str] = field(
        default_factory=list,
        metadata=_help("attention and model: kernel configurations to time as well, like stray_limit=64,forward=4:3"),
    )
    kernel_times: bool = field(
        default=False, metadata=_help("attention and model: also print the time of each kernel")
    )
    cache_lengths: list[int] = field(
        default_factory=lambda: [32768, 131072], metadata=_help("decode: cached tokens, multiples of 64")
    )
    batches: list[int] = field(default_factory=lambda: [1, 8], metadata=_help("decode: sequences"))
    new_tokens: int = field(
        default=128, metadata=_help("decode: tokens that a 1 B model generates on each cache; 0 for none")
    )
    model: str | None = field(
        default=None,
        metadata=_help(
            "model: folder or Hub id, dense (converted to each of maps) or sparse (timed as it is); by default a "
            "Llama of 1 B parameters with random weights, whose heads, kv_heads and head_dim are those above"
        ),
    )
    shape: list[str] = field(
        default_factory=list,
        metadata=_help("model: other fields of its LlamaConfig, like num_hidden_layers=32 hidden_size=4096"),
    )
    maps: list[str] | None = field(
        default=None, metadata=_help("model: maps that are timed, by default entmax and asentmax")
    )
    text: list[str] = field(
        default_factory=list,
        metadata=_help("model: files that a named model reads; by default the source text of this package"),
    )
    compile: str = field(
        default="layers",
        metadata=_help(
            "model: layers compiles the decoder layer once for all of them (seconds), model the whole of it as "
            "torch.compile(model) does (minutes), none nothing"
        ),
    )
    checkpointing: bool = field(default=False, metadata=_help("model: gradient checkpointing of the layers"))
    optimizer: bool = field(default=False, metadata=_help("model: the step ends with one of fused AdamW"))
    documents: int = field(default=32, metadata=_help("packing: documents in a sequence"))

    def __post_init__(self):
        asked = {"decode": self.decode, "tune": self.tune, "model": self.model is not None}
        for name in (name for name, given in asked.items() if given):
            if self.what not in ("attention", name):
                raise ValueError(f"{name} and what {self.what!r} exclude each other")
            self.what = name
        if self.what not in KINDS:
            raise ValueError(f"what is {self.what!r}; choose one of {', '.join(KINDS)}")
        if self.lengths is None:
            self.lengths = list(KINDS[self.what].lengths)
        if self.head_dim is None:
            self.head_dim = 64 if self.what == "model" else 128
        if self.alpha is None and self.what != "model":
            self.alpha = 1.5


def check_arguments(arguments: BenchmarkArguments) -> None:
    """Raises ValueError for what names nothing known, or is given but not read by what is timed."""
    default = BenchmarkArguments(what=arguments.what)
    given = {one.name for one in fields(arguments) if getattr(arguments, one.name) != getattr(default, one.name)}
    idle = given - KINDS[arguments.what].options - {"decode", "tune", "seed", "output_dir"}
    if idle:
        readers = [name for name, kind in KINDS.items() if idle <= kind.options]
        raise ValueError(
            f"{', '.join(sorted(idle))}: not read by what {arguments.what!r}"
            + (f", but by {', '.join(readers)}" if readers else "")
        )
    if arguments.dtype not in DTYPES:
        raise ValueError(f"dtype is {arguments.dtype!r}; choose one of {', '.join(DTYPES)}")
    unknown = [name for name in arguments.peers if name not in PEERS]
    if unknown:
        raise ValueError(f"peers has {', '.join(map(repr, unknown))}; choose from {', '.join(PEERS)}")
    for name in ("lengths", "cache_lengths"):
        for length in getattr(arguments, name):
            if length < 1 or (length % BLOCK and arguments.what not in _ANY_LENGTH):
                raise ValueError(f"{name} has {length}; a length is a positive multiple of {BLOCK}")
    for name in ("batch", "heads", "kv_heads", "head_dim", "repeats", "documents"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}; the least is 1")
    if min(arguments.batches) < 1 or arguments.new_tokens < 0:
        raise ValueError(f"batches is {arguments.batches}, new_tokens {arguments.new_tokens}: they are not negative")
    for change in arguments.changes:
        fields_of(change)
    for noise in arguments.noise:
        if not 0 <= noise <= 1:
            raise ValueError(f"noise has {noise}; it is a share between 0 and 1")
    if arguments.heads % arguments.kv_heads:
        raise ValueError(f"heads is {arguments.heads}, not a multiple of kv_heads, {arguments.kv_heads}")
    _check_model(arguments, default)
    if arguments.what == "packing" and min(arguments.lengths) < arguments.documents:
        raise ValueError(f"documents is {arguments.documents}, more than the {min(arguments.lengths)} tokens")
    if arguments.what == "slopes" and (arguments.heads % 2 or arguments.kv_heads % 2):
        raise ValueError(
            f"heads is {arguments.heads} and kv_heads {arguments.kv_heads}; slopes are timed on half of them: give "
            "even numbers"
        )


def _check_model(arguments: BenchmarkArguments, default: BenchmarkArguments) -> None:
    if arguments.compile not in COMPILED:
        raise ValueError(f"compile is {arguments.compile!r}; choose one of {', '.join(COMPILED)}")
    unknown = [name for name in arguments.maps or () if name not in SPECIFICATIONS]
    if unknown:
        raise ValueError(f"maps has {', '.join(map(repr, unknown))}; choose from {', '.join(SPECIFICATIONS)}")
    own = [
        name
        for name in ("shape", "heads", "kv_heads", "head_dim")
        if getattr(arguments, name) != getattr(default, name)
    ]
    if arguments.model is not None and own:
        raise ValueError(f"{', '.join(own)} is given, but {arguments.model} has its own")
    if arguments.model is None and arguments.text:
        raise ValueError("text is given, but a model with random weights reads random tokens: name a --model")
    known = set(LlamaConfig().to_dict())
    for name in shape_of(arguments.shape):
        if name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            raise ValueError(f"shape has {name}; use --heads, --kv_heads and --head_dim")
        if name not in known:
            raise ValueError(f"shape has {name}, which is no field of LlamaConfig")


def shape_of(fields_of_config: list[str]) -> dict[str, int | float]:
    """["num_hidden_layers=4", "initializer_range=0.1"] -> names and values."""
    values = {}
    for one in fields_of_config:
        name, _, value = one.partition("=")
        try:
            values[name] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"shape has {one!r}; write it like num_hidden_layers=32") from None
    return values


def fields_of(change: str) -> dict:
    """stray_limit=64,stray_forward=true,forward=4:3 -> names and values; 4:3 is a `Launch` of 4 warps, 3 stages."""
    from ..kernels.configurations import Launch

    def value_of(text):
        if text in ("true", "false"):
            return text == "true"
        return Launch(*(int(number) for number in text.split(":"))) if ":" in text else int(text)

    try:
        return {name: value_of(value) for name, value in (part.split("=") for part in change.split(","))}
    except (TypeError, ValueError):
        raise ValueError(f"changes has {change!r}; write it like stray_limit=64,forward=4:3") from None
