"""The summary of a training run -> what a model card says of it: a table and the command. A run in stages has a value
for each stage where they differ; a number that is not there is said to be missing."""

from __future__ import annotations

from collections.abc import Callable

from .. import tables
from ..held_out import held_out_in_words
from .evidence import Evidence, local_name, without_folders

MISSING = "missing"


def status(evidence: Evidence, base: str) -> str:
    """What was done to the base model, in one or two sentences."""
    summary = evidence.summary
    if summary is not None:
        parts = [_done(stage) for stage in stages_of(summary)]
        return f"Base model: {base}. Its attention was replaced, and {', then '.join(parts)}."
    if evidence.conversion is not None:
        same = ": it computes what the base model computes" if evidence.checkpoint.sparse.alpha == 1 else ""
        return (
            f"Base model: {base}. Its attention was replaced; **it was not trained since**{same}. No training summary "
            "was found."
        )
    return f"Base model: {MISSING}. How the model was trained is {MISSING}: there is no training summary."


def training(evidence: Evidence, base: str) -> str:
    """The table of the recipe, and the command that was run."""
    summary = evidence.summary
    if summary is None:
        return f"The numbers of the training are {MISSING}: there is no training summary."

    def each(say: Callable[[dict], str]) -> str:
        said = [(stage, say(stage)) for stage in stages_of(summary)]
        if len({text for _, text in said}) == 1:
            return said[0][1]
        return "; ".join(
            f"stage {index} ({_kind(stage)}): {text}" for index, (stage, text) in enumerate(said, start=1)
        )

    rows = [
        ["base model", base],
        ["steps", whole(summary.get("steps"))],
        ["tokens", whole(summary.get("tokens"))],
        ["passes over the data", number(summary.get("epochs"), "{:.2f}")],
        ["tokens in a block", each(lambda stage: whole(stage.get("block_size")))],
        ["blocks in a step", each(lambda stage: whole(stage.get("blocks_per_step")))],
        *([["recipe of `train`", f"`{summary['recipe']}`"]] if summary.get("recipe") else []),
        ["learning rate", each(lambda stage: number(stage.get("learning_rate"), "{:g}"))],
        ["learning rate of new parameters", each(lambda stage: number(stage.get("new_learning_rate"), "{:g}"))],
        ["learning rate schedule", each(_schedule)],
        ["alpha schedule", each(_alpha_schedule)],
        *([["start of the factor", start]] if (start := options_of(stages_of(summary)[0]).get("scale_start")) else []),
        ["optimizer", each(_optimizer)],
        ["precision", each(_precision)],
        ["what was trained", each(_trained)],
        *([["distillation", each(_distillation)]] if any(map(_distils, stages_of(summary))) else []),
        ["seed", each(lambda stage: whole(options_of(stage).get("seed")))],
        ["training data", names_of(summary.get("train_data"))],
        ["held-out data", names_of(summary.get("eval_data"))],
        ["at the end of training", each(_loss)],
        ["held-out loss", held_out_in_words(summary, lambda loss: number(loss, "{:.4f}")) or MISSING],
        ["steps left out", whole(summary.get("skipped_steps"))],
        ["hardware", str(summary.get("hardware") or MISSING)],
        ["time", number(summary.get("seconds"), "{:,.1f} s")],
        ["tokens a second", number(summary.get("tokens_per_second"), "{:,.0f}")],
        ["versions", ", ".join(f"{key} {value}" for key, value in (summary.get("versions") or {}).items()) or MISSING],
    ]
    command = summary.get("command")
    shown = f"```bash\n{without_folders(command)}\n```" if command else f"The command is {MISSING}."
    return f"{tables.markdown(['recipe', ''], rows)}\n\n{shown}"


def stages_of(summary: dict) -> list[dict]:
    """The summaries of a run's stages, or of the run itself."""
    return summary.get("stages") or [summary]


def number(value: float | None, pattern: str) -> str:
    """A number as the card shows it.

    Raises:
        ValueError: for a value of another kind.
    """
    if value is None:
        return MISSING
    if not isinstance(value, (int, float)):
        raise ValueError(f"a file that the model card is made of has {value!r} where a number belongs")
    return pattern.format(value)


def whole(value: int | None) -> str:
    return number(value, "{:,}")


def names_of(names: list[str] | None) -> str:
    return ", ".join(f"`{local_name(name)}`" for name in names) if names else MISSING


def options_of(summary: dict) -> dict:
    """The options of a run, or of a stage."""
    return summary.get("options") or {}


def _kind(summary: dict) -> str:
    return summary.get("stage") or "pretrain"


def _distils(summary: dict) -> bool:
    return bool(options_of(summary).get("distill"))


def _done(summary: dict) -> str:
    amount = f"for {whole(summary.get('steps'))} steps over {whole(summary.get('tokens'))} tokens"
    if _kind(summary) == "match":
        return f"its layers learned the outputs of the dense attention {amount}"
    return f"its pretraining continued {amount}"


def _schedule(summary: dict) -> str:
    options = options_of(summary)
    if options.get("schedule") is None:
        return MISSING
    text = f"{options['schedule']}, warm-up over {number(options.get('warmup_share'), '{:.1%}')} of the steps"
    if options["schedule"] == "constant":
        return text
    return f"{text}, down to {number(options.get('final_share'), '{:.1%}')} of the peak"


def _alpha_schedule(summary: dict) -> str:
    options, alpha = options_of(summary), (summary.get("sparse_attention") or {}).get("alpha")
    if alpha == 1:
        return "alpha is 1 throughout"
    schedule = options.get("alpha_schedule")
    if schedule is None or alpha is None:
        return MISSING
    if schedule == "none":
        return f"{alpha:g} from the first step"
    # Where no held-out loss says it, the options do; matching begins just above softmax.
    start = (summary.get("eval_alpha") or [None])[0] or options.get("alpha_start")
    if start is None:
        start = 1 if _kind(summary) != "match" else None
    share = number(options.get("alpha_share"), "{:.0%}")
    steps = f", in {options['alpha_plateaus']} plateaus" if options.get("alpha_plateaus") else ""
    return f"{schedule}, from {number(start, '{:g}')} to {alpha:g} over the first {share} of the steps{steps}"


def _optimizer(summary: dict) -> str:
    options = options_of(summary)
    beta1, beta2 = (number(options.get(name), "{:g}") for name in ("beta1", "beta2"))
    decay, clip = (number(options.get(name), "{:g}") for name in ("weight_decay", "clip"))
    return f"AdamW, betas {beta1} and {beta2}, weight decay {decay}, gradient norm clipped at {clip}"


def _precision(summary: dict) -> str:
    dtype, mixed = options_of(summary).get("dtype"), summary.get("mixed_precision")
    return f"parameters {dtype or MISSING}, mixed precision {mixed or MISSING}"


def _trained(summary: dict) -> str:
    options = options_of(summary)
    rank = options.get("lora_rank")
    if rank is None:
        return MISSING
    if rank:
        return f"LoRA adapters of rank {rank}, merged, and the map's own parameters"
    return {
        "map": "the map's own parameters alone",
        "attention": "the attention layers alone",
        "all": "all parameters",
    }[options.get("trained") or ("map" if _kind(summary) == "match" else "all")]


def _distillation(summary: dict) -> str:
    options = options_of(summary)
    if not _distils(summary):
        return "none"
    weight, temperature = (number(options.get(f"distill_{name}"), "{:g}") for name in ("weight", "temperature"))
    return f"from `{local_name(options['distill'])}`, weight {weight}, temperature {temperature}"


def _loss(summary: dict) -> str:
    kind = "loss on text"
    if _kind(summary) == "match":
        kind = "squared error of the attention outputs, relative to their size"
    elif _distils(summary):
        kind = "loss with the distillation's share"
    return f"{kind} {number(summary.get('train_loss'), '{:.4f}')}"
