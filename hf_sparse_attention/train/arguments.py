"""Options of `train`, checked as far as they can be without a model or data."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import LAYERS, POSITIONS, SPECIFICATIONS
from ..loading import check_dtype
from .recipe import ALPHA_SCHEDULES, SCHEDULES


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class TrainArguments:
    """Options of `train`."""

    model: str = field(metadata=_help("dense or sparse model: a folder or a Hub id"))
    output: str = field(metadata=_help("folder of the run: output/model at the end, metrics.jsonl, checkpoints"))
    train_data: list[str] = field(
        metadata=_help(
            "text: .txt, .jsonl or .parquet files (also .xz, .gz, .zst), patterns, or Hub datasets owner/name"
        )
    )
    eval_data: list[str] = field(default_factory=list, metadata=_help("text to evaluate on (default: no evaluation)"))
    map: str | None = field(
        default=None,
        metadata=_help(
            f"map a dense model is converted to on the fly: {', '.join(SPECIFICATIONS)}, or none to train the dense "
            "model itself as a control (default: asentmax; a sparse model keeps its own)"
        ),
    )
    alpha: float | None = field(
        default=None, metadata=_help("alpha at the end (default: the model's, or the map's own)")
    )
    position: str | None = field(
        default=None, metadata=_help(f"position scheme of the conversion: {', '.join(POSITIONS)} (default: rope)")
    )
    layers: str | None = field(
        default=None,
        metadata=_help(f"layers that are converted: {', '.join(LAYERS)}, or numbers such as 0,2,5 (default: all)"),
    )
    revision: str | None = field(default=None, metadata=_help("branch, tag or commit of a model on the Hub"))
    text_column: str = field(default="text", metadata=_help("column of JSON lines, parquet or datasets with the text"))
    train_split: str = field(default="train", metadata=_help("split of Hub datasets in train_data"))
    eval_split: str = field(default="validation", metadata=_help("split of Hub datasets in eval_data"))
    blank_lines: bool = field(
        default=False, metadata=_help("split plain text without <|endoftext|> lines into documents at blank lines")
    )
    streaming: bool = field(
        default=False, metadata=_help("read and pack while training instead of before; shuffles within a buffer")
    )
    shuffle_buffer: int = field(default=1024, metadata=_help("blocks in the buffer that streaming shuffles"))
    block_size: int | None = field(
        default=None, metadata=_help("tokens in a block (default: the model's positions, at most 2048)")
    )
    batch_size: int = field(default=8, metadata=_help("blocks in a forward pass of one process"))
    gradient_accumulation: int = field(default=1, metadata=_help("forward passes of one process in a step"))
    steps: int = field(default=1000, metadata=_help("optimizer steps"))
    learning_rate: float = field(default=3e-4, metadata=_help("peak learning rate of the dense model's parameters"))
    new_learning_rate: float | None = field(
        default=None, metadata=_help("peak learning rate of the map's new parameters (default: learning_rate)")
    )
    schedule: str = field(default="cosine", metadata=_help("learning rate after warm-up: cosine, linear or constant"))
    warmup_share: float = field(default=0.02, metadata=_help("share of the steps in which learning rates rise from 0"))
    final_share: float = field(default=0.1, metadata=_help("share of the peak that cosine and linear end at"))
    alpha_schedule: str | None = field(
        default=None,
        metadata=_help(
            "alpha from 1, the dense model, to its end: linear, cosine or none (no rise; default: linear for a model "
            "that was only trained with softmax, none for one that was trained with its map)"
        ),
    )
    alpha_share: float = field(default=0.5, metadata=_help("share of the steps in which alpha rises"))
    weight_decay: float = field(default=0.1, metadata=_help("of matrices; new parameters, norms and biases have none"))
    beta1: float = field(default=0.9, metadata=_help("AdamW's first beta"))
    beta2: float = field(default=0.95, metadata=_help("AdamW's second beta"))
    clip: float = field(default=1.0, metadata=_help("largest gradient norm; 0 does not clip"))
    dtype: str = field(default="float32", metadata=_help("of the parameters: float32, bfloat16 or float16"))
    mixed_precision: str | None = field(
        default=None, metadata=_help("no, bf16 or fp16 (default: what accelerate launch was told, else no)")
    )
    gradient_checkpointing: bool = field(default=False, metadata=_help("recompute layers backward to save memory"))
    compile: bool = field(default=False, metadata=_help("torch.compile the model; each new alpha compiles again"))
    cpu: bool = field(default=False, metadata=_help("train on the CPU even if there is a GPU"))
    lora_rank: int = field(default=0, metadata=_help("rank of LoRA adapters (PEFT); 0 trains all parameters"))
    lora_alpha: float | None = field(
        default=None, metadata=_help("LoRA's scaling numerator (default: twice the rank)")
    )
    lora_dropout: float = field(default=0.0, metadata=_help("dropout before LoRA's first matrix"))
    lora_targets: list[str] = field(
        default_factory=list,
        metadata=_help("modules with adapters (default: the projections of every attention layer)"),
    )
    lora_save: str = field(
        default="merge", metadata=_help("merge: save a whole model; adapter: save the adapter of a sparse model")
    )
    eval_every: int = field(
        default=100, metadata=_help("steps between evaluations; also before the first and at the end")
    )
    eval_blocks: int = field(default=64, metadata=_help("blocks of eval_data that are evaluated, from its beginning"))
    statistics_blocks: int = field(
        default=2, metadata=_help("blocks on which the attention is looked at with each evaluation; 0: not at all")
    )
    log_every: int = field(default=10, metadata=_help("steps that a line of metrics.jsonl averages"))
    checkpoint_every: int = field(default=200, metadata=_help("steps between checkpoints; 0 writes none"))
    keep_checkpoints: int = field(default=2, metadata=_help("newest checkpoints that are kept"))
    resume: str = field(
        default="never",
        metadata=_help("auto: go on from the newest whole checkpoint in output; a path: from that one; never"),
    )
    overwrite: bool = field(default=False, metadata=_help("remove an earlier run in output; nothing else is removed"))
    on_nan: str = field(
        default="stop", metadata=_help("at a loss or gradient that is not finite: stop, or skip the step")
    )
    save_dtype: str | None = field(default=None, metadata=_help("dtype of the saved model (default: dtype)"))
    seed: int = field(default=0, metadata=_help("of the order of the data, adapters and dropout"))
    report_to: list[str] = field(
        default_factory=list, metadata=_help("trackers that accelerate knows, such as tensorboard or wandb")
    )
    run_name: str = field(default="hf-sparse-attention", metadata=_help("project name at the trackers"))
    push_to_hub: bool = field(
        default=False, metadata=_help("at the end push the model, with a card of this run; the token is as for `push`")
    )
    hub_model_id: str | None = field(default=None, metadata=_help("owner/name that push_to_hub pushes to"))
    hub_private: bool = field(default=False, metadata=_help("make the repository of push_to_hub private if it is new"))


def check_numbers(arguments: TrainArguments) -> None:
    """Raises ValueError for a number out of its range or a name that is not among the choices."""
    at_least = {
        "batch_size": 1, "gradient_accumulation": 1, "steps": 1, "eval_every": 1, "eval_blocks": 1, "log_every": 1,
        "keep_checkpoints": 1, "checkpoint_every": 0, "statistics_blocks": 0, "shuffle_buffer": 1, "lora_rank": 0,
        "learning_rate": 0, "new_learning_rate": 0, "weight_decay": 0, "clip": 0, "lora_dropout": 0, "seed": 0,
        "block_size": 2,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    for name in ("warmup_share", "final_share", "alpha_share", "beta1", "beta2"):
        if not 0 <= (value := getattr(arguments, name)) <= 1:
            raise ValueError(f"{name} is {value}; it must be from 0 to 1")
    choices = {
        "schedule": SCHEDULES, "alpha_schedule": (*ALPHA_SCHEDULES, None), "lora_save": ("merge", "adapter"),
        "on_nan": ("stop", "skip"), "mixed_precision": ("no", "bf16", "fp16", None),
        "map": (*SPECIFICATIONS, "none", None), "position": (*POSITIONS, None),
    }  # fmt: skip
    for name, allowed in choices.items():
        if (value := getattr(arguments, name)) not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(item for item in allowed if item)}")
    check_dtype(arguments.dtype)
    check_dtype(arguments.save_dtype, "save_dtype")
    if not arguments.train_data:
        raise ValueError("train_data names no text")
    unused = {
        "lora_rank": (arguments.lora_rank, ("lora_alpha", "lora_dropout", "lora_targets")),
        "overwrite or resume, not both": (not (arguments.overwrite and arguments.resume != "never"), ("resume",)),
    }
    for needed, (given, names) in unused.items():
        used = [name for name in names if getattr(arguments, name)]
        if not given and used:
            raise ValueError(f"{', '.join(used)} needs {needed}")
    if arguments.map == "none":
        given = [
            name
            for name in ("alpha", "position", "layers", "new_learning_rate")
            if getattr(arguments, name) is not None
        ]
        if given:
            raise ValueError(f"map is 'none', the dense model as it is, which has no {', '.join(given)}")
