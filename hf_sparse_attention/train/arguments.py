"""Options of `train`, checked as far as they can be without a model or data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ..config import LAYERS, POSITIONS, SPECIFICATIONS
from ..loading import check_dtype
from .lengths import parse_block_sizes
from .recipe import ALPHA_SCHEDULES, SCALE_STARTS, SCHEDULES, TRAINED

STAGES = ("pretrain", "match")
RECIPES = ("match_distill", "anneal")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class TrainArguments:
    """Options of `train`."""

    model: str = field(metadata=_help("dense or sparse model: a folder or a Hub id"))
    output: str = field(
        metadata=_help(
            "folder of the run: output/model at the end, metrics.jsonl (of stages: in stages/), checkpoints"
        )
    )
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
    heads: str | None = field(
        default=None,
        metadata=_help(
            "heads that are converted in those layers: all, numbers such as 0,1,4, or layer:heads words such as "
            "'0:0,1 3:2' (layers left out: all); the others keep softmax (default: all)"
        ),
    )
    scale_start: str | None = field(
        default=None,
        metadata=_help(
            "start of ASEntmax's factor where a dense model is converted: neutral (exactly 1: delta 0.95, beta 0.05), "
            "beta (1 but for rounding: delta 0, beta 1, which can fall too), or normal (weights N(0, 0.02), biases 0, "
            "delta 1: about 1.7; default: neutral)"
        ),
    )
    revision: str | None = field(default=None, metadata=_help("branch, tag or commit of a model on the Hub"))
    text_column: str = field(default="text", metadata=_help("column of JSON lines, parquet or datasets with the text"))
    train_split: str = field(default="train", metadata=_help("split of Hub datasets in train_data"))
    eval_split: str | None = field(
        default=None, metadata=_help("split of Hub datasets in eval_data (default: validation)")
    )
    blank_lines: bool = field(
        default=False, metadata=_help("split plain text without <|endoftext|> lines into documents at blank lines")
    )
    streaming: bool = field(
        default=False, metadata=_help("read and pack while training instead of before; shuffles within a buffer")
    )
    shuffle_buffer: int | None = field(
        default=None, metadata=_help("blocks in the buffer that streaming shuffles (default: 1024)")
    )
    block_size: str | None = field(
        default=None,
        metadata=_help(
            "tokens in a block, or sizes that grow with their share of the steps, 1024:0.8,4096:0.2, as many tokens "
            "in each step (default: the model's positions, at most 2048)"
        ),
    )
    rope_theta: float | None = field(
        default=None, metadata=_help("new base of the rotary frequencies, for longer blocks (default: the model's)")
    )
    rope_yarn: float | None = field(
        default=None, metadata=_help("YaRN factor: rotary positions reach so many times further (default: none)")
    )
    max_positions: int | None = field(
        default=None, metadata=_help("positions the model then reaches (default: its own, times rope_yarn)")
    )
    recipe: str | None = field(
        default=None,
        metadata=_help(
            "what is done with a model that was only trained with softmax: match_distill, a fifth of the steps that "
            "pull each sparse layer to the dense one while alpha rises, then text and the dense model's logits; "
            "anneal, one stage that raises alpha (default: match_distill, or anneal where other options ask for it; a "
            "line says which and why)"
        ),
    )
    stage: str | None = field(
        default=None,
        metadata=_help(
            "one stage instead of a recipe. pretrain: on the text; match: pull the output of each sparse attention "
            "layer to the dense layer's, on the dense model's hidden states, everything else frozen (default: "
            "pretrain)"
        ),
    )
    stages: list[str] = field(
        default_factory=list,
        metadata=_help(
            "several stages one after the other, each a YAML mapping of the options that differ in it, such as "
            "'{stage: match, steps: 200}' '{steps: 1800}'; each goes on from the model of the one before"
        ),
    )
    trained: str | None = field(
        default=None,
        metadata=_help(
            "all; attention: the sparse layers' attention; map: the map's new parameters (default: all, in stage "
            "match map; with lora_rank the adapters and the map's)"
        ),
    )
    distill: str | None = field(
        default=None,
        metadata=_help(
            "dense model whose logits are learned from too: a folder or a Hub id; also a folder of `convert`, for the "
            "dense model in it"
        ),
    )
    distill_revision: str | None = field(
        default=None, metadata=_help("branch, tag or commit of a model on the Hub that is distilled")
    )
    distill_weight: float | None = field(
        default=None, metadata=_help("share of the loss that is distillation (default: 0.5, in match_distill 0.6)")
    )
    distill_temperature: float | None = field(
        default=None, metadata=_help("temperature of both softmaxes in distillation (default: 1)")
    )
    loss_chunk: int = field(
        default=0,
        metadata=_help(
            "labels whose logits exist at once, which bounds their memory (in stage match that of evaluations); 0: "
            "those of the whole batch"
        ),
    )
    batch_size: int = field(default=8, metadata=_help("blocks in a forward pass of one process"))
    gradient_accumulation: int = field(default=1, metadata=_help("forward passes of one process in a step"))
    steps: int = field(default=1000, metadata=_help("optimizer steps"))
    learning_rate: float = field(
        default=3e-4,
        metadata=_help(
            "peak learning rate of the dense model's parameters; a tenth of the peak it was pretrained at is a good "
            "start. In match_distill 20/3 of it while matching, then half of it"
        ),
    )
    new_learning_rate: float | None = field(
        default=None,
        metadata=_help(
            "peak learning rate of the map's new parameters (default: learning_rate; in match_distill 200/3 of that, "
            "then 10/3)"
        ),
    )
    schedule: str = field(default="cosine", metadata=_help("learning rate after warm-up: cosine, linear or constant"))
    warmup_share: float = field(default=0.02, metadata=_help("share of the steps in which learning rates rise from 0"))
    final_share: float | None = field(
        default=None,
        metadata=_help(
            "share of the peak that cosine and linear end at (default: 0.1, in the second stage of match_distill 0.02)"
        ),
    )
    alpha_schedule: str | None = field(
        default=None,
        metadata=_help(
            "alpha from 1, the dense model, to its end: linear, cosine or none (no rise; default: linear for a model "
            "that was only trained with softmax, none for one that was trained with its map)"
        ),
    )
    alpha_start: float | None = field(
        default=None,
        metadata=_help("alpha in the first step of a rise (default: 1, the dense model; 1.01 in stage match)"),
    )
    alpha_plateaus: int | None = field(
        default=None,
        metadata=_help("raise alpha in so many steps (default: a little with every step)"),
    )
    alpha_share: float | None = field(
        default=None, metadata=_help("share of the steps in which alpha rises (default: 0.5)")
    )
    weight_decay: float = field(default=0.1, metadata=_help("of matrices; new parameters, norms and biases have none"))
    beta1: float = field(default=0.9, metadata=_help("AdamW's first beta"))
    beta2: float = field(default=0.95, metadata=_help("AdamW's second beta"))
    clip: float = field(default=1.0, metadata=_help("largest gradient norm; 0 does not clip"))
    dtype: str = field(default="float32", metadata=_help("of the parameters: float32, bfloat16 or float16"))
    mixed_precision: str | None = field(
        default=None, metadata=_help("no, bf16 or fp16 (default: what accelerate launch was told, else no)")
    )
    gradient_checkpointing: bool = field(default=False, metadata=_help("recompute layers backward to save memory"))
    compile: bool = field(default=False, metadata=_help("torch.compile the model"))
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
    lora_save: str | None = field(
        default=None,
        metadata=_help("merge: save a whole model; adapter: save the adapter of a sparse model (default: merge)"),
    )
    eval_every: int = field(
        default=100, metadata=_help("steps between evaluations; also before the first and at the end")
    )
    eval_blocks: int | None = field(
        default=None, metadata=_help("blocks of eval_data that are evaluated, from its beginning (default: 64)")
    )
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
    on_nonfinite: str = field(
        default="stop",
        metadata=_help("at a loss or gradient that is not finite, or without memory left: stop, or skip the step"),
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


# Options that need another one, and what they are where it is given and they are not.
_NEEDED = {
    "lora_rank": {"lora_alpha": None, "lora_dropout": None, "lora_targets": None, "lora_save": "merge"},
    "streaming": {"shuffle_buffer": 1024},
    "eval_data": {"eval_split": "validation", "eval_blocks": 64},
    "distill": {"distill_weight": 0.5, "distill_temperature": 1.0, "distill_revision": None},
}
_WAY_OUT = {"distill": ": name the dense model whose logits are learned with --distill MODEL"}
# What is not given and does not depend on another option. None tells a recipe that it may choose.
DEFAULTS = {"stage": "pretrain", "alpha_share": 0.5, "final_share": 0.1}


def check_arguments(arguments: TrainArguments) -> TrainArguments:
    """The arguments with the defaults that depend on other ones.

    Raises:
        ValueError: for a number out of its range, a name that is not among the choices, or an option without effect.
    """
    _check_numbers(arguments)
    choices = {
        "schedule": SCHEDULES, "alpha_schedule": (*ALPHA_SCHEDULES, None), "lora_save": ("merge", "adapter", None),
        "on_nonfinite": ("stop", "skip"), "mixed_precision": ("no", "bf16", "fp16", None),
        "map": (*SPECIFICATIONS, "none", None), "position": (*POSITIONS, None), "stage": (*STAGES, None),
        "recipe": (*RECIPES, None),
        "trained": (*TRAINED, None), "scale_start": (*SCALE_STARTS, None),
    }  # fmt: skip
    for name, allowed in choices.items():
        if (value := getattr(arguments, name)) not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(item for item in allowed if item)}")
    check_dtype(arguments.dtype)
    check_dtype(arguments.save_dtype, "save_dtype")
    if not arguments.train_data:
        raise ValueError("train_data names no text")
    if arguments.overwrite and arguments.resume != "never":
        raise ValueError("use overwrite or resume, not both")
    changed = {name: value for name, value in DEFAULTS.items() if getattr(arguments, name) is None}
    for needed, names in _NEEDED.items():
        given = bool(getattr(arguments, needed))
        used = [name for name in names if getattr(arguments, name)]
        if not given and used:
            raise ValueError(f"{', '.join(used)} needs {needed}{_WAY_OUT.get(needed, '')}")
        if given:
            changed |= {name: default for name, default in names.items() if getattr(arguments, name) is None}
    _check_stage(arguments)
    if arguments.recipe is not None and (arguments.stages or arguments.stage is not None):
        given = "stages are" if arguments.stages else f"stage {arguments.stage!r} is"
        raise ValueError(f"recipe is {arguments.recipe!r}, but {given} given too: leave one of the two out")
    if arguments.alpha_schedule == "none" or arguments.map == "none":
        names = ("alpha_start", "alpha_plateaus", "alpha_share")
        _refuse(arguments, names, "needs an alpha that rises: --alpha_schedule linear")
    if arguments.schedule == "constant":
        _refuse(arguments, ("final_share",), "needs a learning rate that falls: --schedule cosine or linear")
    if arguments.map == "none":
        names = (
            "alpha", "position", "layers", "heads", "scale_start", "new_learning_rate", "alpha_schedule", "recipe",
        )  # fmt: skip
        _refuse(arguments, names, "has no place with map 'none', the dense model as it is")
    if arguments.streaming and len(parse_block_sizes(arguments.block_size or 2)) > 1:
        raise ValueError(
            f"block_size is {arguments.block_size!r}, but streaming packs blocks of one size: leave one of the two out"
        )
    return replace(arguments, **changed)


def _refuse(arguments: TrainArguments, names: tuple[str, ...], reason: str) -> None:
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} {reason}")


def _check_stage(arguments: TrainArguments) -> None:
    if arguments.lora_rank and arguments.trained is not None:
        raise ValueError(
            f"trained is {arguments.trained!r}, but with lora_rank the adapters and the map's are trained"
        )
    if arguments.map == "none" and arguments.trained not in (None, "all"):
        raise ValueError(f"trained is {arguments.trained!r}, but map is 'none': it has no sparse layers, train all")
    if arguments.stage != "match":
        return
    if arguments.map == "none":
        raise ValueError("stage is 'match', but map is 'none': there is no sparse attention to match with")
    if arguments.distill is not None:
        raise ValueError("distill learns from logits, which stage 'match' has none of: use it in stage pretrain")
    if arguments.trained == "all":
        raise ValueError("trained is 'all', but in stage 'match' everything beside the attention is frozen")


def _check_numbers(arguments: TrainArguments) -> None:
    at_least = {
        "batch_size": 1, "gradient_accumulation": 1, "steps": 1, "eval_every": 1, "eval_blocks": 1, "log_every": 1,
        "keep_checkpoints": 1, "checkpoint_every": 0, "statistics_blocks": 0, "shuffle_buffer": 1, "lora_rank": 0,
        "learning_rate": 0, "new_learning_rate": 0, "weight_decay": 0, "clip": 0, "lora_dropout": 0, "seed": 0,
        "loss_chunk": 0, "alpha_start": 1, "alpha_plateaus": 1,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    for name in ("warmup_share", "final_share", "alpha_share", "beta1", "beta2", "distill_weight"):
        if (value := getattr(arguments, name)) is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be from 0 to 1")
    if (value := arguments.distill_temperature) is not None and not 0 < value < math.inf:
        raise ValueError(f"distill_temperature is {value}; it must be above 0")
    if arguments.block_size is not None:
        parse_block_sizes(arguments.block_size)
