"""What `train` does where neither stages nor a stage are named: two stages that keep a dense model's quality best, or
one that raises alpha; which of them, and why."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import SparseAttentionConfig
from ..loading import RECORD, Source
from ..maps import MAPS, ASEntmaxScale
from .arguments import RECIPES, TrainArguments
from .head import scales_logits
from .lengths import parse_block_sizes
from .plan import alpha_schedule_of, changed_rope, positions_of

MATCH_DISTILL, ANNEAL = RECIPES
# Of examples/conversion/match-distill.yaml, whose rates are those of a learning_rate of 3e-4: the share of the tokens
# that is matched on, and a stage's peak rates of dense and of new parameters as multiples of learning_rate.
MATCH_SHARE = 150 / 674
MATCH_RATES = (20 / 3, 200 / 3)
DISTILL_RATES = (1 / 2, 10 / 3)
DISTILL_WEIGHT = 0.6
# Shares of fewer steps are no shares.
FEWEST_STEPS = 10
# Options that are those of one stage; in match_distill each stage has its own.
_OF_ONE_STAGE = ("alpha_schedule", "alpha_start", "alpha_plateaus", "alpha_share", "trained")


@dataclass(frozen=True)
class Choice:
    """A recipe and why it is that one; no recipe (None) for a control, for a stage by its name, and for a trained
    model, which has a reason."""

    name: str | None
    reason: str = ""
    begun: bool = False


def choose(arguments: TrainArguments, source: Source, settings: SparseAttentionConfig | None) -> Choice:
    """The recipe of a run.

    Args:
        arguments: as they were given.
        settings: what the attention computes at the end; None for a dense model as it is.

    Raises:
        ValueError: if the recipe that is asked for, or the one that output holds, does not go with the other options.
    """
    begun = begun_recipe(arguments)
    two = begun == MATCH_DISTILL
    differs = {
        "recipe": arguments.recipe not in (None, begun),
        "stage": two and arguments.stage is not None,
        "map": two and settings is None,
    }
    if begun is not None and any(differs.values()):
        name = next(name for name, found in differs.items() if found)
        raise ValueError(
            f"{name} is {getattr(arguments, name)!r}, but {arguments.output} holds a run of recipe {begun!r}: go on "
            f"without --{name}, replace it with --overwrite, or name another --output"
        )
    against = [] if settings is None else against_match_distill(arguments, source, settings)
    asked = begun or arguments.recipe
    if settings is None or arguments.stage is not None:
        return Choice(None)
    if asked == MATCH_DISTILL and against:
        other = f"use --recipe {ANNEAL}, or write --stages of your own (examples/conversion)"
        if begun:
            other = f"{arguments.output} holds such a run. Go on as it was begun, replace it, or name another --output"
        raise ValueError(f"recipe is {MATCH_DISTILL!r}, but {against[0]}: {other}")
    if not source.is_untrained and arguments.recipe is None:
        return Choice(None, against[0])
    if not source.is_untrained and alpha_schedule_of(arguments, source, settings) == "none":
        raise ValueError(
            f"recipe is {ANNEAL!r}, but {against[0]}, and alpha stays {settings.alpha:g}: leave recipe out, or let "
            "alpha rise once more with --alpha_schedule linear"
        )
    if asked is not None:
        return Choice(asked, f"{arguments.output} holds such a run" if begun else "asked for", begun is not None)
    return (
        Choice(ANNEAL, against[0])
        if against
        else Choice(MATCH_DISTILL, f"{source.name} was only trained with softmax")
    )


def begun_recipe(arguments: TrainArguments) -> str | None:
    """The recipe of the run that output holds and that is to go on.

    Raises:
        ValueError: if its stages were written by hand, and none are given now.
    """
    file = Path(arguments.output).expanduser() / "run.json"
    if arguments.resume not in ("never", "auto"):
        # A checkpoint by its path is of one stage.
        return ANNEAL
    if arguments.resume == "never" or not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))
    if "stages" not in known or "blocks_per_step" in known:
        return ANNEAL if known.get("stage", "pretrain") == "pretrain" and known.get("map") != "none" else None
    if known.get("recipe") is None:
        raise ValueError(
            f"{arguments.output} holds a run of stages ({', '.join(known['stages'])}): go on with the --stages it was "
            "begun with, replace it with --overwrite, or name another --output"
        )
    return known["recipe"]


def against_match_distill(arguments: TrainArguments, source: Source, settings: SparseAttentionConfig) -> list[str]:
    """Why the two stages are not what these options ask for, most telling first; empty if they can be."""
    found = []
    if not source.is_untrained:
        found.append(f"{arguments.model} was trained since it was converted (it has no {RECORD})")
    if own := [name for name in _OF_ONE_STAGE if getattr(arguments, name) is not None]:
        found.append(f"{', '.join(own)} {'is' if len(own) == 1 else 'are'} of a run in one stage")
    if arguments.lora_rank:
        found.append("it trains the whole attention, and lora_rank adapters alone")
    if arguments.rope_theta or arguments.rope_yarn or arguments.max_positions:
        found.append("rope_theta, rope_yarn and max_positions would change the layers that are matched too")
    if source.is_sparse and (changed := changed_rope(source)):
        found.append(f"{arguments.model} was converted with {changed}, and its layers are no longer the dense ones")
    if arguments.block_size is not None and len(parse_block_sizes(arguments.block_size)) > 1:
        found.append(f"blocks that grow ({arguments.block_size}) would grow in each stage anew")
    # Gradients would be rounding alone, which AdamW makes steps of.
    neutral = MAPS[settings.map].scale in (None, ASEntmaxScale) and arguments.scale_start != "normal"
    if settings.alpha == 1 and settings.position == "rope" and neutral:
        found.append(f"{settings.map} begins as the dense attention at alpha 1, and there is nothing to match")
    if scales_logits(source.config):
        found.append(f"{source.config.model_type} scales or bounds its logits, which distillation does not compute")
    if arguments.steps < FEWEST_STEPS:
        found.append(f"{arguments.steps} steps are too few for two stages")
    # The rates were found where positions stay: these have a lot more to learn.
    if settings.position != "rope" and arguments.recipe is None:
        found.append(f"its rates are for the dense model's positions, not for {settings.position}")
    return found


def check_reach(arguments: TrainArguments, source: Source, settings: SparseAttentionConfig, block_size: int) -> None:
    """Raises ValueError for blocks longer than the dense model has positions: match_distill learns from its layers and
    logits, also if no `distill` names it."""
    limit = positions_of(source)
    if arguments.distill is not None or limit is None or block_size <= limit:
        return
    stretch = f" --rope_yarn {math.ceil(block_size / limit)}" if settings.position == "rope" else ""
    raise ValueError(
        f"block_size is {block_size}, but {source.name} has rotary positions up to {limit} (max_position_embeddings), "
        f"and recipe {MATCH_DISTILL} learns from its dense layers and logits in blocks of the same size: use "
        f"--block_size {limit}, or one stage without a teacher: --recipe {ANNEAL}{stretch}"
    )


def stages_of_recipe(arguments: TrainArguments, settings: SparseAttentionConfig) -> TrainArguments:
    """The arguments with the two stages of match_distill written out: `steps` in all, as many blocks in each."""
    match = max(1, round(MATCH_SHARE * arguments.steps))
    rises = settings.alpha > 1
    first = {
        "stage": "match", "steps": match, "trained": "attention",
        **_rates(arguments, settings, MATCH_RATES),
        **({"alpha_schedule": "linear", "alpha_share": 0.8} if rises else {}),
    }  # fmt: skip
    second = {
        "steps": arguments.steps - match,
        **_rates(arguments, settings, DISTILL_RATES),
        **({"alpha_schedule": "none"} if rises else {}),
        **({"final_share": 0.02} if arguments.final_share is None and arguments.schedule != "constant" else {}),
    }
    own = arguments.distill is None
    return replace(
        arguments,
        stages=[json.dumps(first), json.dumps(second)],
        distill=arguments.model if own else arguments.distill,
        distill_revision=arguments.revision if own else arguments.distill_revision,
        distill_weight=DISTILL_WEIGHT if arguments.distill_weight is None else arguments.distill_weight,
    )


def _rates(arguments: TrainArguments, settings: SparseAttentionConfig, multiples: tuple[float, float]) -> dict:
    row = MAPS[settings.map]
    rates = {"learning_rate": _short(arguments.learning_rate * multiples[0])}
    if arguments.new_learning_rate is not None:
        rates["new_learning_rate"] = arguments.new_learning_rate
    elif row.has_parameters:
        rates["new_learning_rate"] = _short(arguments.learning_rate * multiples[1])
    return rates


def _short(rate: float) -> float:
    """Without the digits that come of thirds."""
    return float(f"{rate:.6g}")


def said(choice: Choice, arguments: TrainArguments, source: Source, settings: SparseAttentionConfig) -> str:
    """One line for the user: which recipe, why, and how to get the other."""
    if choice.name != MATCH_DISTILL:
        rises = alpha_schedule_of(arguments, source, settings) != "none"
        alpha = f"in which alpha rises to {settings.alpha:g}" if rises else f"alpha {settings.alpha:g} throughout"
        recipe = "no recipe" if choice.name is None else f"recipe {choice.name}"
        other = "" if choice.begun or not source.is_untrained else f". The other: --recipe {MATCH_DISTILL}"
        return f"{recipe} (one stage, {alpha}): {choice.reason}{other}"
    first, second = (json.loads(stage) for stage in stages_of_recipe(arguments, settings).stages)
    teacher = arguments.distill or arguments.model
    return (
        f"recipe {MATCH_DISTILL} ({first['steps']} steps that match the dense layers at rate "
        f"{first['learning_rate']:g}, {second['steps']} that learn from text and from {teacher} at rate "
        f"{second['learning_rate']:g}): {choice.reason}"
        + ("" if choice.begun else f". One stage without a second model in memory: --recipe {ANNEAL}")
    )
