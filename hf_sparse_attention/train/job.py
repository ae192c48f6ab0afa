"""Arguments of a stage -> everything that is decided before its model is loaded: what it starts from, what it makes of
it, how long its blocks are, on how many processes, and what it is known by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ..config import SparseAttentionConfig
from ..loading import Source
from ..text import load_tokenizer
from .arguments import TrainArguments, check_arguments
from .data import check_texts
from .distributed import check_launch, join_processes, make_accelerator
from .lengths import Phase, parse_block_sizes, phases_of
from .plan import (
    alpha_schedule_of,
    check_block_size,
    check_fit,
    default_block_size,
    find_source,
    find_teacher,
    settings_of,
)
from .recipe import LOWEST_ALPHA, alpha_at, rate_at
from .run import check_output, identity_of

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Job:
    """What a stage has to do.

    Args:
        arguments: complete: what was left to be chosen is chosen.
        teacher: the dense model that is distilled, None without one.
        settings: of the attention at the end, None of a dense model.
        phases: block sizes and the steps they begin at.
        first_alpha: alpha of step 0.
        identity: what must be the same for the run to go on.
    """

    arguments: TrainArguments
    output: Path
    source: Source
    teacher: Source | None
    settings: SparseAttentionConfig | None
    tokenizer: PreTrainedTokenizerBase
    phases: list[Phase]
    first_alpha: float
    accelerator: Accelerator
    identity: dict

    @property
    def matches(self) -> bool:
        """Whether layers learn to give the dense layers' outputs."""
        return self.arguments.stage == "match"

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def block_size(self) -> int:
        """The longest."""
        return self.phases[-1].block_size

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, the same in every phase."""
        return _step_tokens(self.arguments, self.phases, self.processes)

    @property
    def target(self) -> float | None:
        """Alpha at the end, None of a dense model."""
        return None if self.settings is None else self.settings.alpha

    def alpha(self, step: int) -> float:
        """Alpha of a step counted from 0."""
        arguments = self.arguments
        # Step 0 is the dense model however short the run.
        rise = math.ceil(arguments.alpha_share * arguments.steps)
        return alpha_at(
            step, target=self.target, schedule=arguments.alpha_schedule, rise=rise, start=self.first_alpha,
            plateaus=arguments.alpha_plateaus,
        )  # fmt: skip

    def rate(self, step: int) -> float:
        """Share of the peak learning rates in a step counted from 0."""
        arguments = self.arguments
        warmup = round(arguments.warmup_share * arguments.steps)
        return rate_at(
            step, steps=arguments.steps, schedule=arguments.schedule, warmup=warmup, final=arguments.final_share
        )


def _step_tokens(arguments: TrainArguments, phases: list[Phase], processes: int) -> int:
    return phases[0].batch_size * phases[0].block_size * arguments.gradient_accumulation * processes


def decide(arguments: TrainArguments) -> Job:
    """The job of a stage; nothing is written.

    Raises:
        ValueError: for arguments, a model or a tokenizer that do not fit together.
        FileExistsError: if output is in use and the run is neither to go on nor to be replaced.
        OSError: if the model or data is missing or corrupt.
    """
    arguments = check_arguments(arguments)
    check_launch(arguments)
    # What looks for trackers logs, which accelerate does only when it knows its processes.
    state = join_processes(arguments)
    from accelerate.tracking import filter_trackers

    found = filter_trackers(arguments.report_to, arguments.output)
    installed = {"all", *(str(getattr(tracker, "value", tracker)) for tracker in found)}
    if lost := sorted(set(arguments.report_to) - installed):
        raise ValueError(f"report_to names {', '.join(lost)}, which is not installed")
    output = Path(arguments.output).expanduser()
    check_output(output, arguments)
    check_texts(arguments)
    with state.local_main_process_first():
        source = find_source(arguments)
        teacher = find_teacher(arguments, source)
    sizes = parse_block_sizes(arguments.block_size or default_block_size(source))
    phases = phases_of(sizes, arguments.steps, arguments.batch_size)
    settings = settings_of(source, arguments, phases[0].block_size)
    check_fit(source, settings, arguments)
    arguments = replace(arguments, alpha_schedule=alpha_schedule_of(arguments, source, settings))
    matches = arguments.stage == "match"
    check_block_size(source, settings, phases[-1].block_size, matches=matches)
    tokenizer = load_tokenizer(source.folder, source.config.get_text_config().vocab_size)
    # At 1 a layer is the dense one, and there is nothing to match.
    first_alpha = arguments.alpha_start or (LOWEST_ALPHA if matches else 1.0)
    if settings is not None and arguments.alpha_schedule == "none":
        first_alpha = settings.alpha
    # A head that learns its alpha takes no part while alpha is 1, which DDP has to be told.
    idles = settings is not None and settings.map == "adaptive_entmax" and first_alpha == 1
    accelerator = make_accelerator(arguments, output, idles=idles)
    # What accelerate was told counts as if it were an option.
    known = replace(arguments, mixed_precision=accelerator.mixed_precision)
    lengths = phases[-1].block_size if len(sizes) == 1 else sizes
    blocks = _step_tokens(arguments, phases, accelerator.num_processes) // phases[0].block_size
    identity = identity_of(known, blocks, lengths, tokenizer, source, teacher)
    return Job(
        arguments=arguments, output=output, source=source, teacher=teacher, settings=settings, tokenizer=tokenizer,
        phases=phases, first_alpha=first_alpha, accelerator=accelerator, identity=identity,
    )  # fmt: skip
