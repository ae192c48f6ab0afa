"""Options of `train-task`, checked as far as they can be without a model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from ..config import POSITIONS, SPECIFICATIONS
from ..maps import MAPS as ROWS
from ..tasks.samples import SyntheticTask
from ..tasks.synthetic import SYNTHETIC, make_task
from .recipe import SCALE_STARTS, SCHEDULES

MAPS = ("softmax", *SPECIFICATIONS)
PRECISIONS = ("float32", "bfloat16")
TESTED = ("best", "all")
# Maps whose alpha is above 1, or begins there.
RISING = ("entmax", "asentmax", "adaptive_entmax")
# Maps with parameters of their own.
LEARNED = tuple(name for name in SPECIFICATIONS if ROWS[name].has_parameters)
OPTIMIZERS = ("adamw", "muon")
# How ASEntmax's factor is treated while alpha is 1.
FACTOR_WHILE_SOFTMAX = ("held", "learned")
# torch's generators take no higher one.
MOST_SEED = 2**64 - 1
TASK_SCALE_STARTS = (*SCALE_STARTS, "logarithm")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class TrainTaskArguments:
    """Options of `train-task`: small models from scratch on a synthetic task, one run per learning rate and seed."""

    task: str = field(metadata=_help(f"what is learned: {', '.join(SYNTHETIC)}"))
    output: str = field(
        metadata=_help("folder of the runs: one folder each, summary.json and summary.md of those of the last call")
    )
    task_settings: list[str] = field(
        default_factory=list, metadata=_help("what differs from the task's own sizes, as name=number: symbols=64")
    )
    lengths: list[int] = field(
        default_factory=list,
        metadata=_help("shortest and longest training length (default: the task's, mostly 32 64)"),
    )
    map: str = field(default="asentmax", metadata=_help(f"attention map: {', '.join(MAPS)}"))
    alpha: float | None = field(
        default=None, metadata=_help("alpha of the map (default: its own; 1: softmax, with its factor)")
    )
    position: str = field(default="nape", metadata=_help(f"position scheme: {', '.join(POSITIONS)}"))
    scale_start: str = field(
        default="neutral",
        metadata=_help(
            "start of ASEntmax's factor: neutral (exactly 1: delta 0.95, beta 0.05), beta (1: delta 0, beta 1), "
            "normal (weights N(0, 0.02), biases 0, delta 1: about 1.7), or logarithm (SSMax's, log n over its mean in "
            "training)"
        ),
    )
    softmax_share: float = field(
        default=0.0,
        metadata=_help(
            "share of the steps, from the first, in which alpha is 1: as softmax a model finds sooner what it then "
            "does sparsely (entmax, asentmax, adaptive_entmax)"
        ),
    )
    factor_while_softmax: str = field(
        default="held",
        metadata=_help(
            "ASEntmax's factor in those steps: held at its start, or learned, from which most sparse models did not "
            "recover what they had known"
        ),
    )
    layers: int = field(default=2, metadata=_help("layers of the model"))
    hidden_size: int = field(default=256, metadata=_help("its hidden size"))
    heads: int = field(default=8, metadata=_help("its attention heads"))
    ffn_size: int = field(default=1024, metadata=_help("inner size of its feed-forward layers"))
    steps: int = field(default=10_000, metadata=_help("optimizer steps of a run"))
    batch_size: int = field(default=128, metadata=_help("samples in a step"))
    learning_rates: list[float] = field(default_factory=lambda: [1e-3], metadata=_help("peak rates, one run each"))
    new_learning_rate_share: float = field(
        default=1.0,
        metadata=_help(
            "rate of a map's own parameters (ASEntmax's factor, SSMax's, a learned alpha) as a share of the run's; 0 "
            "leaves them at their start"
        ),
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata=_help("of parameters and training samples; every rate has every seed")
    )
    schedule: str = field(default="cosine", metadata=_help(f"rate after warm-up: {', '.join(SCHEDULES)}"))
    warmup_steps: int = field(default=500, metadata=_help("steps in which the rate rises from 0, fewer than steps"))
    final_share: float = field(default=0.0, metadata=_help("share of the peak that cosine and linear end at"))
    optimizer: str = field(
        default="adamw",
        metadata=_help(
            "adamw, or muon: Muon for the matrices of the layers, at the same rate, and AdamW for all else"
        ),
    )
    weight_decay: float = field(default=0.0, metadata=_help("of matrices; a map's own parameters have none"))
    beta1: float = field(default=0.9, metadata=_help("AdamW's first beta"))
    beta2: float = field(default=0.99, metadata=_help("AdamW's second beta"))
    clip: float = field(
        default=1.0,
        metadata=_help(
            "largest gradient norm, which what is held at its start (new_learning_rate_share 0, factor_while_softmax) "
            "is part of; 0 does not clip"
        ),
    )
    precision: str = field(
        default="float32", metadata=_help("float32, or bfloat16: computed in it (autocast) with parameters in float32")
    )
    compile: bool = field(default=False, metadata=_help("torch.compile the model"))
    cuda_graph: bool = field(
        default=False, metadata=_help("capture the whole step as a CUDA graph, so that no kernel waits for Python")
    )
    together: int = field(
        default=1,
        metadata=_help(
            "runs side by side on the device, a step of each in turn; with cuda_graph their kernels overlap"
        ),
    )
    device: str = field(default="auto", metadata=_help("auto, cpu, cuda or cuda:N"))
    log_every: int = field(default=100, metadata=_help("steps between lines of metrics.jsonl; the loss is read then"))
    validate_every: int = field(
        default=0, metadata=_help("steps between validations; 0: at the end alone, by which runs are compared")
    )
    validation_lengths: list[int] = field(
        default_factory=list,
        metadata=_help("lengths of validation (default: once, twice and 4 times the longest training length)"),
    )
    validation_samples: int = field(default=200, metadata=_help("validation samples of a length"))
    test_lengths: list[int] = field(
        default_factory=list, metadata=_help("lengths of the test at the end (default: none)")
    )
    tested: str = field(
        default="best", metadata=_help("what is tested: best (the run that validation prefers), or all of the grid")
    )
    test_precision: str | None = field(
        default=None, metadata=_help("precision of the test, float32 or bfloat16 (default: that of training)")
    )
    test_samples: int = field(default=1000, metadata=_help("test samples of a length, from the fixed set's beginning"))
    batch_tokens: int = field(default=65_536, metadata=_help("tokens per batch of validation and test"))
    checkpoint_every: int = field(default=1000, metadata=_help("steps between checkpoints; 0: none"))
    resume: str = field(
        default="never",
        metadata=_help("auto: go on from the last checkpoint of every run in output and keep finished ones; never"),
    )
    overwrite: bool = field(default=False, metadata=_help("remove earlier runs of this grid in output"))

    def chosen_task(self) -> SyntheticTask:
        """The task.

        Raises:
            ValueError: for an unknown task or a setting it does not have.
        """
        settings = {}
        for item in self.task_settings:
            name, separator, value = item.partition("=")
            if name in settings:
                raise ValueError(f"task_settings names {name} twice: {' '.join(self.task_settings)}")
            try:
                settings[name] = float(value) if "." in value else int(value)
            except ValueError:
                separator = ""
            if not separator:
                raise ValueError(f"task_settings holds {item!r}; write name=number, such as symbols=64")
        return make_task(self.task, settings)

    def training_lengths(self) -> tuple[int, int]:
        """Shortest and longest training length.

        Raises:
            ValueError: if two were not given, or the task does not take them.
        """
        task = self.chosen_task()
        if self.lengths and len(self.lengths) != 2:
            raise ValueError(f"lengths is {self.lengths}; give the shortest and the longest")
        return task.check_lengths(tuple(self.lengths) or task.default_lengths)

    def softmax_steps(self) -> int:
        """Steps from the first in which alpha is 1."""
        # A share such as 0.07 is not exact: 7.000000000000001 steps are 7.
        return max(math.ceil(round(self.softmax_share * self.steps, 6)), int(self.softmax_share > 0))

    def validated_lengths(self) -> list[int]:
        longest = self.training_lengths()[1]
        return sorted(set(self.validation_lengths)) or [longest, 2 * longest, 4 * longest]


def may_learn_factor_while_softmax(options: dict) -> bool:
    """Whether a run with these options can learn ASEntmax's factor while it is softmax."""
    shares = options["softmax_share"], options["new_learning_rate_share"]
    return options["map"] == "asentmax" and min(shares) > 0


def check_task_arguments(arguments: TrainTaskArguments) -> None:
    """Raises ValueError for a number out of its range or a name that is not among the choices."""
    task = arguments.chosen_task()
    arguments.training_lengths()
    for length in (*arguments.validated_lengths(), *arguments.test_lengths):
        task.check_lengths((length, length))
    at_least = {
        "layers": 1, "hidden_size": 1, "heads": 1, "ffn_size": 1, "steps": 1, "batch_size": 1, "warmup_steps": 0,
        "weight_decay": 0, "clip": 0, "log_every": 1, "validate_every": 0, "validation_samples": 1, "test_samples": 1,
        "batch_tokens": 1, "checkpoint_every": 0, "together": 1, "new_learning_rate_share": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if not (value := getattr(arguments, name)) >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if arguments.warmup_steps >= arguments.steps:
        raise ValueError(
            f"warmup_steps is {arguments.warmup_steps} and steps is {arguments.steps}: the learning rate would rise "
            f"to the very end. Give fewer, such as --warmup_steps {arguments.steps // 20}, or more steps"
        )
    if not 0 <= arguments.final_share <= 1:
        raise ValueError(f"final_share is {arguments.final_share}; it must be from 0 to 1")
    for name in ("beta1", "beta2"):
        if not 0 <= (value := getattr(arguments, name)) < 1:
            raise ValueError(f"{name} is {value}; it must be from 0 to below 1")
    for name in ("clip", "weight_decay", "new_learning_rate_share"):
        if getattr(arguments, name) == math.inf:
            raise ValueError(f"{name} is inf; give a number")
    choices = {
        "map": MAPS, "position": tuple(POSITIONS), "schedule": SCHEDULES, "precision": PRECISIONS,
        "scale_start": TASK_SCALE_STARTS, "resume": ("auto", "never"), "tested": TESTED,
        "optimizer": OPTIMIZERS, "test_precision": (None, *PRECISIONS), "factor_while_softmax": FACTOR_WHILE_SOFTMAX,
    }  # fmt: skip
    for name, allowed in choices.items():
        if (value := getattr(arguments, name)) not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(filter(None, allowed))}")
    if not arguments.learning_rates or not all(0 < rate < math.inf for rate in arguments.learning_rates):
        raise ValueError(f"learning_rates is {arguments.learning_rates}; give at least one, all above 0")
    if not arguments.seeds or min(arguments.seeds) < 0 or max(arguments.seeds) > MOST_SEED:
        raise ValueError(f"seeds is {arguments.seeds}; give at least one, all from 0 to {MOST_SEED}")
    if arguments.hidden_size % arguments.heads:
        raise ValueError(f"hidden_size is {arguments.hidden_size}, which {arguments.heads} heads do not divide")
    if arguments.position == "rope" and arguments.hidden_size // arguments.heads % 2:
        raise ValueError(
            f"hidden_size {arguments.hidden_size} with {arguments.heads} heads gives them an odd size, which rotary "
            "positions cannot turn"
        )
    if arguments.schedule == "constant" and arguments.final_share:
        raise ValueError(
            f"final_share is {arguments.final_share}, but schedule 'constant' ends at the peak: leave it out"
        )
    if arguments.map == "softmax" and arguments.alpha is not None:
        raise ValueError(f"alpha is {arguments.alpha}, but softmax has none; entmax takes it")
    if arguments.map != "softmax" and arguments.alpha == 1 and ROWS[arguments.map].learned_alpha:
        raise ValueError(
            f"alpha is 1, from which {arguments.map} learns no other: it would be softmax to the end. Give a higher "
            "alpha, or --map softmax"
        )
    if not 0 <= arguments.softmax_share < 1 or arguments.softmax_steps() == arguments.steps:
        raise ValueError(
            f"softmax_share is {arguments.softmax_share}; it must be from 0 to below 1, so that some of the "
            f"{arguments.steps} steps are the map's own"
        )
    if arguments.softmax_share and (arguments.map not in RISING or arguments.alpha == 1):
        raise ValueError(
            f"softmax_share is {arguments.softmax_share}, which {', '.join(RISING)} have with an alpha above 1; "
            f"map is {arguments.map!r}, alpha {arguments.alpha}: leave it out"
        )
    if arguments.factor_while_softmax == "learned" and not may_learn_factor_while_softmax(asdict(arguments)):
        raise ValueError(
            "factor_while_softmax is 'learned', which asentmax has with a softmax_share and a new_learning_rate_share "
            f"above 0; map is {arguments.map!r}, softmax_share {arguments.softmax_share}, new_learning_rate_share "
            f"{arguments.new_learning_rate_share}: leave it out"
        )
    if arguments.new_learning_rate_share != 1 and arguments.map not in LEARNED:
        raise ValueError(
            f"new_learning_rate_share is {arguments.new_learning_rate_share}, which maps with parameters of their own "
            f"have ({', '.join(LEARNED)}); map is {arguments.map!r}: leave it out"
        )
    if arguments.scale_start != "neutral" and arguments.map != "asentmax":
        raise ValueError(
            f"scale_start is {arguments.scale_start!r}, which only asentmax has; map is {arguments.map!r}: "
            "leave it out"
        )
    if arguments.test_precision is not None and not arguments.test_lengths:
        raise ValueError(
            f"test_precision is {arguments.test_precision!r}, but no test is asked for: give --test_lengths too"
        )
    if arguments.overwrite and arguments.resume != "never":
        raise ValueError("overwrite removes earlier runs, resume goes on with them: choose one")
